"""The evaluator: a small network that reads a picture of the scenes world back into its attributes.

It gives two measures that need no person: prompt adherence (is everything that a caption states true of the picture?)
and a Fréchet distance between its features of pictures and of renders (Heusel et al. 2017, with this network in place
of Inception).
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tdm_train.recipes import EvaluatorRecipe
from tdm_train.run import Run
from tdm_train.scenes.captions import Claim, ItemClaim, check_layout
from tdm_train.scenes.world import BACKGROUNDS, LAYOUTS, OBJECT_COLOURS, SHAPES, SIZES, Scene, draw_scene, render_batch

WEIGHTS = Path(__file__).parent / "evaluator.safetensors"
FEATURES = 128
# name of each thing that is read -> its possible values; the second item's are meaningless when there is one object
HEADS: dict[str, tuple[str, ...]] = {
    "layout": LAYOUTS,
    "background": BACKGROUNDS,
    **{
        f"{what} {slot}": values
        for slot in (0, 1)
        for what, values in (("shape", SHAPES), ("colour", OBJECT_COLOURS), ("size", tuple(SIZES)))
    },
}


@dataclass(frozen=True)
class Reading:
    """What the evaluator sees in one picture: items in scene order, one of LAYOUTS, one of BACKGROUNDS."""

    items: tuple[ItemClaim, ...]
    layout: str
    background: str


class Evaluator(nn.Module):
    """Four convolutions over 4x4 pixel blocks, 128 features, one linear head per attribute; 0.6 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (48, 64, 96, 128, 128)
        layers: list[nn.Module] = []
        for index, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(narrow, wide, 3, stride=1 if index == 0 else 2, padding=1), nn.GroupNorm(8, wide), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.features = nn.Linear(128 * 4 * 4, FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in HEADS.items()})

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Pictures [B, 128, 128, 3] with values 0 .. 255 -> (features [B, 128], logits [B, values] by name)."""
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        features = self.features(self.body(F.pixel_unshuffle(pixels, 4)).flatten(1))
        return features, {name: head(F.silu(features)) for name, head in self.heads.items()}

    @torch.no_grad()
    def look(self, images: np.ndarray) -> tuple[np.ndarray, list[Reading]]:
        """uint8 pictures [N, 128, 128, 3] -> (float32 features [N, 128], N readings)."""
        features, readings = [], []
        for chunk in np.array_split(images, max(1, len(images) // 100)):
            feature, logits = self(torch.from_numpy(chunk))
            features.append(feature.float().numpy())
            choice = {name: logit.argmax(1).tolist() for name, logit in logits.items()}
            readings += [_reading({name: choice[name][i] for name in HEADS}) for i in range(len(chunk))]
        return np.concatenate(features), readings


def _reading(choice: dict[str, int]) -> Reading:
    value = {name: HEADS[name][index] for name, index in choice.items()}
    count = 1 if choice["layout"] < 9 else 2
    items = tuple(ItemClaim(value[f"shape {slot}"], value[f"colour {slot}"], value[f"size {slot}"]) for slot in range(count))
    return Reading(items, value["layout"], value["background"])


def load_evaluator(weights: Path = WEIGHTS) -> Evaluator:
    """The committed evaluator, in evaluation mode."""
    evaluator = Evaluator()
    evaluator.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return evaluator.eval()


# --- judging -----------------------------------------------------------------------------------------------------------


def judge(claim: Claim, reading: Reading) -> dict[str, bool]:
    """Which kinds of stated attribute are right: a dict over those of count, shape, colour, size, place and background
    that the caption states. A pair whose order the caption leaves open is matched in whichever order agrees best."""
    if len(claim.items) != len(reading.items):
        return {"count": False, **dict.fromkeys(_stated(claim), False)}
    orders = [reading.items] if claim.place or len(claim.items) == 1 else [reading.items, reading.items[::-1]]
    return max((_judge_in_order(claim, reading, items) for items in orders), key=lambda verdict: sum(verdict.values()))


def _stated(claim: Claim) -> list[str]:
    attributes = {kind for item in claim.items for kind in ("shape", "colour", "size") if getattr(item, kind)}
    attributes |= {kind for kind in ("place", "background") if getattr(claim, kind)}
    return sorted(attributes)


def _judge_in_order(claim: Claim, reading: Reading, items: tuple[ItemClaim, ...]) -> dict[str, bool]:
    verdict = {"count": True}
    for kind in _stated(claim):
        if kind == "place":
            verdict[kind] = check_layout(claim.place, reading.layout)
        elif kind == "background":
            verdict[kind] = claim.background == reading.background
        else:
            pairs = [(getattr(said, kind), getattr(seen, kind)) for said, seen in zip(claim.items, items, strict=True)]
            verdict[kind] = all(said in (None, seen) for said, seen in pairs)
    return verdict


def adherence(claims: Iterable[Claim], readings: Iterable[Reading]) -> tuple[float, dict[str, float]]:
    """Share of pictures all of whose stated attributes are right, and the share right per attribute where stated."""
    verdicts = [judge(claim, reading) for claim, reading in zip(claims, readings, strict=True)]
    kinds = sorted({kind for verdict in verdicts for kind in verdict})
    by_kind = {kind: float(np.mean([verdict[kind] for verdict in verdicts if kind in verdict])) for kind in kinds}
    return float(np.mean([all(verdict.values()) for verdict in verdicts])), by_kind


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features [N, D] and [M, D]: |m1-m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    mean, covariance = features.mean(0), np.cov(features.astype(np.float64), rowvar=False)
    other_mean, other_covariance = reference.mean(0), np.cov(reference.astype(np.float64), rowvar=False)
    root = scipy.linalg.sqrtm(covariance @ other_covariance)
    return float(np.square(mean - other_mean).sum() + np.trace(covariance + other_covariance - 2 * np.real(root)))


# --- training ----------------------------------------------------------------------------------------------------------


def labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """int64 [B] per head; -100 (ignored by cross entropy) for the second item of a scene that has one."""
    rows: dict[str, list[int]] = {name: [] for name in HEADS}
    for scene in scenes:
        rows["layout"].append(LAYOUTS.index(scene.layout))
        rows["background"].append(BACKGROUNDS.index(scene.background))
        for slot in (0, 1):
            for what in ("shape", "colour", "size"):
                values = HEADS[f"{what} {slot}"]
                known = slot < len(scene.items)
                rows[f"{what} {slot}"].append(values.index(getattr(scene.items[slot], what)) if known else -100)
    return {name: torch.tensor(row) for name, row in rows.items()}


def blemish(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blurs, shifts the brightness of and adds noise to pictures [B, H, W, 3], each by its own random amount, so that the
    evaluator reads what a person would read rather than the renderer's exact pixels."""
    amount = torch.rand(3, images.shape[0], 1, 1, 1, generator=generator)
    pixels = images.float()
    blurred = F.avg_pool2d(pixels.permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False).permute(0, 2, 3, 1)
    pixels = pixels + amount[0] * (blurred - pixels)
    pixels = pixels + 12 * amount[1] * torch.randn(images.shape, generator=generator)
    return (pixels + 16 * (amount[2] - 0.5)).clamp(0, 255)


class EvaluatorLoss(nn.Module):
    """Sum of cross entropies over the heads; a module so that gradients synchronise between processes."""

    def __init__(self, evaluator: Evaluator):
        super().__init__()
        self.evaluator = evaluator

    def forward(self, images: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        _, logits = self.evaluator(images)
        return sum((F.cross_entropy(logits[name].float(), labels[name]) for name in HEADS), start=torch.zeros(()))


def train_evaluator(recipe: EvaluatorRecipe, out: Path, resume: bool) -> None:
    """Trains on blemished renders of every split but the evaluation seeds and saves `out/evaluator.safetensors`."""
    run = Run(out, recipe, resume)
    loss_of, optimizer = run.prepare(EvaluatorLoss(Evaluator()), recipe.lr, recipe.warmup, recipe.ema)
    for step in run.steps():
        first = 10**9 + (step * run.processes + run.rank) * recipe.batch
        # The evaluator may know every combination: it is the judge, not the contestant.
        scenes = [draw_scene(seed, "held_out" if seed % 8 == 0 else "train") for seed in range(first, first + recipe.batch)]
        images = blemish(torch.from_numpy(render_batch(scenes)), torch.Generator().manual_seed(first))
        loss = loss_of(images, labels(scenes))
        run.update(loss, loss_of, optimizer)
        run.end_step(loss=float(loss.detach()))
    if run.rank == 0:
        average = run.averages[0][0].module.evaluator
        save_file(
            {name: tensor.half().contiguous() for name, tensor in average.state_dict().items()}, out / "evaluator.safetensors"
        )
        print(f"held-out renders read exactly right: {exactness(average.eval()):.2%}")


def exactness(evaluator: Evaluator, scenes: int = 2000) -> float:
    """Share of held-out renders of which every attribute is read right."""
    truth = [draw_scene(seed, "held_out") for seed in range(2 * 10**9, 2 * 10**9 + scenes)]
    _, readings = evaluator.look(render_batch(truth))
    return float(np.mean([_same(reading, scene) for reading, scene in zip(readings, truth, strict=True)]))


def _same(reading: Reading, scene: Scene) -> bool:
    items = tuple(ItemClaim(item.shape, item.colour, item.size) for item in scene.items)
    return reading == Reading(items, scene.layout, scene.background)

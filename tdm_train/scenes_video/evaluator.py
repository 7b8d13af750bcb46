"""The evaluator of clips: a small network that reads shape, colour, size, background, motion and speed from the frames.

It gives two measures that need no person: prompt adherence (is everything that a caption states true of the clip?) and a
Fréchet distance between its features of clips and of renders (as tdm_train/scenes/evaluator.py does for pictures).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tdm_train.recipes import MotionEvaluatorRecipe
from tdm_train.run import Run
from tdm_train.scenes.evaluator import Evaluator as ImageEvaluator
from tdm_train.scenes.evaluator import load_evaluator as load_image_evaluator
from tdm_train.scenes_video.captions import Claim, truth
from tdm_train.scenes_video.world import ATTRIBUTES, FRAMES, Clip, draw_clip, render_clips

WEIGHTS = Path(__file__).parent / "evaluator.safetensors"
FRAME_FEATURES, FEATURES = 128, 128
FROZEN = 6  # the first two of the image evaluator's convolutions, with what follows each, stay as they are


class Evaluator(nn.Module):
    """The convolutions of the evaluator of pictures over every frame, 128 features a frame, 128 features of all 16 frames (in
    their order, for the motion, and on average, for what stays), one linear head per attribute; 1.0 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ImageEvaluator().body
        self.frame_features = nn.Linear(128 * 2 * 2, FRAME_FEATURES)
        self.features = nn.Sequential(nn.Linear((FRAMES + 1) * FRAME_FEATURES, 256), nn.SiLU(), nn.Linear(256, FEATURES))
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Clips [B, 16, 64, 64, 3] with values 0 .. 255 -> (features [B, 128], logits [B, values] by attribute)."""
        pixels = clips.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
        by_frame = F.silu(self.frame_features(self.body(F.pixel_unshuffle(pixels, 4)).flatten(1))).unflatten(0, (-1, FRAMES))
        features = self.features(torch.cat([by_frame.flatten(1), by_frame.mean(1)], 1))
        return features, {name: head(F.silu(features)) for name, head in self.heads.items()}

    @torch.no_grad()
    def look(self, clips: np.ndarray) -> tuple[np.ndarray, list[Claim]]:
        """uint8 clips [N, 16, 64, 64, 3] -> (float32 features [N, 128], N readings in which nothing is left open)."""
        features, readings = [], []
        for chunk in np.array_split(clips, max(1, len(clips) // 50)):
            feature, logits = self(torch.from_numpy(chunk))
            features.append(feature.float().numpy())
            choice = {name: logit.argmax(1).tolist() for name, logit in logits.items()}
            readings += [_reading({name: choice[name][i] for name in ATTRIBUTES}) for i in range(len(chunk))]
        return np.concatenate(features), readings


def _reading(choice: dict[str, int]) -> Claim:
    values: dict[str, str | None] = {name: ATTRIBUTES[name][index] for name, index in choice.items()}
    return Claim(**values | ({"speed": None} if values["motion"] == "rest" else {}))


def load_evaluator(weights: Path = WEIGHTS) -> Evaluator:
    """The committed evaluator, in evaluation mode."""
    evaluator = Evaluator()
    evaluator.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return evaluator.eval()


def new_evaluator() -> Evaluator:
    """An evaluator that begins with what the committed evaluator of pictures sees."""
    evaluator = Evaluator()
    evaluator.body.load_state_dict(load_image_evaluator().body.state_dict())
    evaluator.body[:FROZEN].requires_grad_(False)
    return evaluator


def labels(clips: list[Clip]) -> dict[str, torch.Tensor]:
    """int64 [B] per attribute; -100 (ignored by cross entropy) for the speed of a clip at rest."""
    rows = [truth(clip) for clip in clips]
    return {
        name: torch.tensor([values.index(getattr(row, name)) if getattr(row, name) else -100 for row in rows])
        for name, values in ATTRIBUTES.items()
    }


def blemish(clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blurs, shifts the brightness of and adds noise to clips [B, 16, 64, 64, 3], each by its own random amount, so that
    the evaluator reads what a person would read rather than the renderer's exact pixels."""
    blur, noise, shift = torch.rand(3, len(clips), 1, 1, 1, 1, generator=generator)
    pixels = clips.float()
    beside, below = pixels.roll(1, 3), pixels.roll(1, 2)
    blurred = (pixels + beside + below + beside.roll(1, 2)) / 4
    pixels = pixels + blur * (blurred - pixels)
    pixels = pixels + 12 * noise * torch.randn(clips.shape, generator=generator)
    return (pixels + 16 * (shift - 0.5)).clamp(0, 255)


class EvaluatorLoss(nn.Module):
    """Sum of cross entropies over the attributes; a module so that gradients synchronise between processes."""

    def __init__(self, evaluator: Evaluator):
        super().__init__()
        self.evaluator = evaluator

    def forward(self, clips: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        _, logits = self.evaluator(clips)
        return sum((F.cross_entropy(logits[name].float(), labels[name]) for name in ATTRIBUTES), start=torch.zeros(()))


def train_evaluator(recipe: MotionEvaluatorRecipe, out: Path, resume: bool) -> None:
    """Trains on blemished renders of every split but the evaluation seeds and saves `out/evaluator.safetensors`."""
    run = Run(out, recipe, resume)
    loss_of, optimizer = run.prepare(EvaluatorLoss(new_evaluator()), recipe.lr, recipe.warmup, recipe.ema)
    for step in run.steps():
        first = 10**9 + (step * run.processes + run.rank) * recipe.batch
        # The evaluator may know every combination: it is the judge, not the contestant.
        clips = [draw_clip(seed, "held_out" if seed % 8 == 0 else "train") for seed in range(first, first + recipe.batch)]
        pixels = blemish(torch.from_numpy(render_clips(clips)), torch.Generator().manual_seed(first))
        loss = loss_of(pixels, labels(clips))
        run.update(loss, loss_of, optimizer)
        run.end_step(loss=float(loss.detach()))
    if run.rank == 0:
        average = run.averages[0][0].module.evaluator
        weights = {name: tensor.half().contiguous() for name, tensor in average.state_dict().items()}
        save_file(weights, out / "evaluator.safetensors")
        shares = exactness(average.eval())
        print("held-out renders read exactly right:", ", ".join(f"{name} {share:.2%}" for name, share in shares.items()))


def exactness(evaluator: Evaluator, clips: int = 2000) -> dict[str, float]:
    """Share of held-out renders of which each attribute is read right, and of those all of whose attributes are ("all")."""
    verdicts = []
    for first in range(2 * 10**9, 2 * 10**9 + clips, 200):
        drawn = [draw_clip(seed, "held_out") for seed in range(first, min(first + 200, 2 * 10**9 + clips))]
        _, readings = evaluator.look(render_clips(drawn))
        verdicts += [truth(clip).judge(seen) for clip, seen in zip(drawn, readings, strict=True)]
    shares = {name: float(np.mean([verdict.get(name, True) for verdict in verdicts])) for name in ATTRIBUTES}
    return shares | {"all": float(np.mean([all(verdict.values()) for verdict in verdicts]))}

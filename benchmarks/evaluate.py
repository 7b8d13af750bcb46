"""`fewstep eval`: do pictures show what their captions say? Renders, autoencoder, teacher and student, side by side.

Every row makes one picture per held-out caption and lets the evaluator read it (tdm_train/scenes/evaluator.py).
Picture i has the noise of seed `seed * 10^6 + i` in every row.
"""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from server.engine.engine import Engine
from server.engine.noise import initial_latents
from server.engine.request import Request
from tdm_train.checkpoint import load_student, open_pipeline
from tdm_train.prompts import encode_prompts
from tdm_train.rollout import rollout
from tdm_train.scenes.autoencoder import to_blocks, to_image
from tdm_train.scenes.evaluator import Evaluator, adherence, frechet_distance, load_evaluator
from tdm_train.scenes.prompts import held_out_captions
from tdm_train.scenes.world import draw_scene, render_batch

REFERENCE_SCENES = range(7 * 10**9, 7 * 10**9 + 4000)
CHUNK = 50


@dataclass(frozen=True)
class Row:
    """One line of the result. `nfe` counts a guided evaluation twice; 0 where no network draws. `attributes` is the share
    right per attribute where stated; `frechet` the distance to renders of 4,000 other held-out scenes."""

    what: str
    nfe: int
    guidance: float
    adherence: float
    attributes: dict[str, float]
    frechet: float
    pictures: np.ndarray = field(repr=False, compare=False)

    def as_json(self) -> dict[str, object]:
        row = {name: value for name, value in asdict(self).items() if name != "pictures"}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


class Evaluation:
    """Draws `count` held-out captions and judges pictures of them.

    Picture-making functions are called with a slice of the captions and return uint8 [n, H, W, 3].
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self.scenes, self.captions, self.claims = zip(*held_out_captions(count, seed), strict=True)
        self.evaluator: Evaluator = load_evaluator()
        reference = render_batch(
            [draw_scene(scene, "held_out") for scene in tqdm(REFERENCE_SCENES, desc="renders", leave=False)]
        )
        self.reference, _ = self.evaluator.look(reference)

    def row(self, what: str, nfe: int, guidance: float, draw: Callable[[slice], np.ndarray]) -> Row:
        name = what if nfe == 0 else f"{what}, {nfe} NFE" + (f", guidance {guidance:g}" if guidance != 1 else "")
        starts = tqdm(range(0, self.count, CHUNK), desc=name, dynamic_ncols=True)
        pictures = np.concatenate([draw(slice(start, start + CHUNK)) for start in starts])
        features, readings = self.evaluator.look(pictures)
        share, attributes = adherence(self.claims, readings)
        return Row(what, nfe, guidance, share, attributes, frechet_distance(features, self.reference), pictures)

    def noise(self, part: slice, shape: tuple[int, ...]) -> torch.Tensor:
        """float32 [n, *shape]: the noise that a server draws for the same seeds."""
        indices = range(*part.indices(self.count))
        return torch.from_numpy(np.stack([initial_latents(self.picture_seed(i), 0, shape, 1.0) for i in indices]))

    def picture_seed(self, index: int) -> int:
        return self.seed * 10**6 + index

    def rendered(self) -> Row:
        return self.row("rendered", 0, 1.0, lambda part: render_batch(list(self.scenes[part])))


class Teacher:
    """A diffusers teacher folder, run by diffusers' own pipeline."""

    def __init__(self, folder: Path, evaluation: Evaluation):
        self.pipeline, self.evaluation = open_pipeline(folder), evaluation
        config = self.pipeline.transformer.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        vae = self.pipeline.vae
        return to_image(vae.decode(latents / vae.config.scaling_factor).sample).numpy()

    def autoencoder(self) -> Row:
        """The ceiling: renders encoded and decoded again."""

        @torch.no_grad()
        def draw(part: slice) -> np.ndarray:
            pictures = torch.from_numpy(render_batch(list(self.evaluation.scenes[part])))
            latents = self.pipeline.vae.encode(to_blocks(pictures)).latent_dist.mean
            return self.decode(latents * self.pipeline.vae.config.scaling_factor)

        return self.evaluation.row("autoencoder", 0, 1.0, draw)

    def row(self, steps: int, guidance: float) -> Row:
        """`steps` DPM-Solver++ steps; with guidance every step is two evaluations."""

        def draw(part: slice) -> np.ndarray:
            latents = self.pipeline(
                list(self.evaluation.captions[part]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=self.evaluation.noise(part, self.shape),
                output_type="latent",
                max_sequence_length=32,
                use_resolution_binning=False,
                clean_caption=False,
            ).images
            return self.decode(latents)

        return self.evaluation.row("teacher", steps * (1 if guidance == 1 else 2), guidance, draw)


def caller(url: str, api_key: str | None) -> httpx.Client:
    """What asks a running server, with its key where it wants one."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url, timeout=60, headers=headers)


def check_nfe(folder: Path, server: httpx.Client | None, nfe_counts: list[int]) -> None:
    """Refuses NFE counts that a student (a folder, or the default student of `server`) does not have, before any work."""
    if server:
        try:
            answer = server.get("/v1/models")
        except httpx.TransportError as error:
            raise ValueError(f"{server.base_url} cannot be reached: {error}") from None
        if answer.status_code != 200:
            raise ValueError(f"{answer.url} answered {answer.status_code}: {answer.text[:300]}")
        legal = answer.json()["data"][0]["nfe"]
    else:
        legal = description_of(folder)["nfe"]
    if illegal := [nfe for nfe in nfe_counts if nfe not in legal]:
        raise ValueError(f"NFE {illegal[0]} is not one of the student's {', '.join(map(str, legal))}")


def description_of(folder: Path) -> dict[str, Any]:
    """student.json of a student folder or of an exported student. Raises ValueError for a folder that is neither."""
    described = next((file for file in (folder / "1/student.json", folder / "student.json") if file.is_file()), None)
    if not described:
        raise ValueError(f"{folder} is neither a student folder nor an exported student: it has no student.json")
    read: dict[str, Any] = json.loads(described.read_text())
    return read


def student_rows(folder: Path, nfe_counts: list[int], evaluation: Evaluation, name: str = "student") -> list[Row]:
    """A student folder (PyTorch) or an exported student (a folder of model_repository), at each of its NFE counts."""
    exported = (folder / "1" / "student.json").is_file()
    draw_for = _draw_exported(folder, evaluation) if exported else _draw_student(folder, evaluation)
    return [evaluation.row(name, nfe, 1.0, draw_for(nfe)) for nfe in nfe_counts]


def _draw_student(folder: Path, evaluation: Evaluation) -> Callable[[int], Callable[[slice], np.ndarray]]:
    student = load_student(folder)
    teacher = Teacher(folder, evaluation)  # the same folder, opened as a pipeline: its decoder
    texts = encode_prompts(student.pipeline, list(evaluation.captions), student.description.text_length)

    def draw(nfe: int, part: slice) -> np.ndarray:
        text, noise = texts.select(part), evaluation.noise(part, teacher.shape)
        return teacher.decode(rollout(student.denoiser, student.denoiser.schedule, noise, text, student.grid(nfe)).states[0])

    return lambda nfe: lambda part: draw(nfe, part)


def _draw_exported(folder: Path, evaluation: Evaluation) -> Callable[[int], Callable[[slice], np.ndarray]]:
    engine = Engine.open(folder)
    size = next(iter(engine.manifest.sizes))

    def draw(nfe: int, index: int) -> np.ndarray:
        return engine.run(Request(evaluation.captions[index], evaluation.picture_seed(index), 0, nfe, size)).image

    return lambda nfe: lambda part: np.stack([draw(nfe, index) for index in range(*part.indices(evaluation.count))])


def server_rows(server: httpx.Client, nfe_counts: list[int], evaluation: Evaluation) -> list[Row]:
    """A running fewstep server, asked for one PNG per caption."""

    def draw(nfe: int, part: slice) -> np.ndarray:
        return np.stack([ask(nfe, index) for index in range(*part.indices(evaluation.count))])

    def ask(nfe: int, index: int) -> np.ndarray:
        body = {"prompt": evaluation.captions[index], "num_inference_steps": nfe, "seed": evaluation.picture_seed(index)}
        response = server.post("/v1/images/generations", json=body, headers={"accept": "image/png"})
        if response.status_code != 200:
            raise ValueError(f"{response.url} answered {response.status_code}: {response.text[:300]}")
        return np.asarray(Image.open(io.BytesIO(response.content)).convert("RGB"))

    return [evaluation.row("student", nfe, 1.0, lambda part, nfe=nfe: draw(nfe, part)) for nfe in nfe_counts]


def draw_grid(rows: list[Row], captions: tuple[str, ...], file: Path, lines: int = 12) -> None:
    """A picture of the first `lines` captions: one column per row of the result, names above, captions beside."""
    side, margin, head = rows[0].pictures.shape[1], 330, 34
    canvas = Image.new("RGB", (margin + len(rows) * (side + 4), head + lines * (side + 4)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, row in enumerate(rows):
        left = margin + column * (side + 4)
        name = row.what if row.nfe == 0 else f"{row.what} {row.nfe} NFE\nguidance {row.guidance:g}"
        pen.multiline_text((left + 2, 3), name, fill="black")
        for line in range(min(lines, len(row.pictures))):
            canvas.paste(Image.fromarray(row.pictures[line]), (left, head + line * (side + 4)))
    for line, caption in enumerate(captions[:lines]):
        pen.multiline_text((6, head + line * (side + 4) + 50), _wrap(caption, 50), fill="black")
    canvas.quantize(256).save(file)


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [*lines, word]
    return "\n".join(lines)


def report(rows: list[Row], captions: int, seed: int, said: str = "", **more: Any) -> None:
    """A table on stderr with `said` below it for people, then one JSON document with `more` in it, the last line of stdout."""
    print(f"{'':14}{'NFE':>4}{'guidance':>10}{'adherence':>11}{'Fréchet':>9}", file=sys.stderr)
    for row in rows:
        print(f"{row.what:14}{row.nfe or '':>4}{row.guidance:>10g}{row.adherence:>11.1%}{row.frechet:>9.2f}", file=sys.stderr)
    print(said, file=sys.stderr, end="\n" if said else "")
    document = {"rows": [row.as_json() for row in rows], "captions": captions, "seed": seed} | more
    print(json.dumps(document))

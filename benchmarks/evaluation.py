"""How students and teachers are judged: one picture or clip per held-out caption, read by a network that tells what it shows.

Shared by `fewstep eval` and `fewstep eval-video`. Number i has the noise of seed `seed * 10^6 + i` in every row.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from server.engine.engine import Engine
from server.engine.noise import initial_latents
from server.engine.request import Request
from tdm_train.checkpoint import load_student
from tdm_train.prompts import encode_prompts
from tdm_train.rollout import rollout
from tdm_train.scenes.evaluator import frechet_distance

Draw = Callable[[slice], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One line of the result. `nfe` counts a guided evaluation twice; 0 where no network draws. `attributes` is the share
    right per attribute where stated; `frechet` the distance to renders of other held-out scenes. pictures: uint8
    [n, H, W, 3], or [n, F, H, W, 3] of clips."""

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


class Evaluator(Protocol):
    """Reads pictures or clips: features [n, D] and what each shows."""

    def look(self, pictures: Any, /) -> tuple[np.ndarray, list[Any]]: ...


class Decoder(Protocol):
    """A diffusers folder, opened as a pipeline: latents [n, *shape] are decoded to uint8 pictures or clips."""

    shape: tuple[int, ...]

    def decode(self, latents: torch.Tensor) -> np.ndarray: ...


@dataclass
class Evaluation:
    """Held-out captions with what they claim, and who judges pictures or clips of them.

    Functions that draw are called with a slice of the captions, `chunk` at a time. adherence: claims, readings -> the share all
    of whose stated attributes are right, and the share right per attribute where stated. reference: features [n, D] of other
    held-out renders.
    """

    captions: Sequence[str]
    claims: Sequence[Any]
    seed: int
    evaluator: Evaluator
    adherence: Callable[[Sequence[Any], Sequence[Any]], tuple[float, dict[str, float]]]
    reference: np.ndarray
    chunk: int

    def row(self, what: str, nfe: int, guidance: float, draw: Draw) -> Row:
        name = what if nfe == 0 else f"{what}, {nfe} NFE" + (f", guidance {guidance:g}" if guidance != 1 else "")
        starts = tqdm(range(0, len(self.captions), self.chunk), desc=name, dynamic_ncols=True)
        pictures = np.concatenate([draw(slice(start, start + self.chunk)) for start in starts])
        features, readings = self.evaluator.look(pictures)
        share, attributes = self.adherence(self.claims, readings)
        return Row(what, nfe, guidance, share, attributes, frechet_distance(features, self.reference), pictures)

    def numbers(self, part: slice) -> range:
        return range(*part.indices(len(self.captions)))

    def noise_seed(self, number: int) -> int:
        return self.seed * 10**6 + number

    def noise(self, part: slice, shape: tuple[int, ...]) -> torch.Tensor:
        """float32 [n, *shape]: the noise that a server draws for the same seeds."""
        drawn = [initial_latents(self.noise_seed(number), 0, shape, 1.0) for number in self.numbers(part)]
        return torch.from_numpy(np.stack(drawn))


def student_rows(
    folder: Path, nfe_counts: list[int], evaluation: Evaluation, open_decoder: Callable[[Path], Decoder], name: str = "student"
) -> list[Row]:
    """A student folder (PyTorch) or an exported student (a folder of model_repository), at each of its NFE counts.

    open_decoder: opens a student folder as a pipeline.
    """
    exported = (folder / "1" / "student.json").is_file()
    draw_for = exported_student(folder, evaluation) if exported else student_in_pytorch(folder, evaluation, open_decoder)
    return [evaluation.row(name, nfe, 1.0, draw_for(nfe)) for nfe in nfe_counts]


def student_in_pytorch(folder: Path, evaluation: Evaluation, open_decoder: Callable[[Path], Decoder]) -> Callable[[int], Draw]:
    student, decoder = load_student(folder), open_decoder(folder)
    texts = encode_prompts(student.pipeline, list(evaluation.captions), student.description.text_length)

    def draw(nfe: int, part: slice) -> np.ndarray:
        text, noise = texts.select(part), evaluation.noise(part, decoder.shape)
        return decoder.decode(rollout(student.denoiser, student.denoiser.schedule, noise, text, student.grid(nfe)).states[0])

    return lambda nfe: lambda part: draw(nfe, part)


def exported_student(folder: Path, evaluation: Evaluation) -> Callable[[int], Draw]:
    engine = Engine.open(folder)
    size = next(iter(engine.manifest.sizes))

    def draw(nfe: int, number: int) -> np.ndarray:
        return engine.run(Request(evaluation.captions[number], evaluation.noise_seed(number), 0, nfe, size)).image

    return lambda nfe: lambda part: np.stack([draw(nfe, number) for number in evaluation.numbers(part)])


def description_of(folder: Path) -> dict[str, Any]:
    """student.json of a student folder or of an exported student. Raises ValueError for a folder that is neither."""
    described = next((file for file in (folder / "1/student.json", folder / "student.json") if file.is_file()), None)
    if not described:
        raise ValueError(f"{folder} is neither a student folder nor an exported student: it has no student.json")
    read: dict[str, Any] = json.loads(described.read_text())
    return read


def check_nfe(nfe_counts: list[int], legal: list[int]) -> None:
    """Refuses NFE counts that a student does not have. Raises ValueError."""
    if illegal := [nfe for nfe in nfe_counts if nfe not in legal]:
        raise ValueError(f"NFE {illegal[0]} is not one of the student's {', '.join(map(str, legal))}")


def report(rows: list[Row], captions: int, seed: int, said: str = "", **more: Any) -> None:
    """A table on stderr with `said` below it for people, then one JSON document with `more` in it, the last line of stdout."""
    print(f"{'':14}{'NFE':>4}{'guidance':>10}{'adherence':>11}{'Fréchet':>9}", file=sys.stderr)
    for row in rows:
        print(f"{row.what:14}{row.nfe or '':>4}{row.guidance:>10g}{row.adherence:>11.1%}{row.frechet:>9.2f}", file=sys.stderr)
    print(said, file=sys.stderr, end="\n" if said else "")
    document = {"rows": [row.as_json() for row in rows], "captions": captions, "seed": seed} | more
    print(json.dumps(document))

"""The proof that exported graphs equal PyTorch: graph by graph, end to end against diffusers, and row by row in batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from export.graphs import Graph, Tensors
from export.reference import diffusers_latents
from server.engine.engine import Engine, Request
from server.engine.session import Session
from tdm_train.checkpoint import Student

TOLERANCE = 1e-4  # on latents and embeddings in float32, see _worst
PIXEL_TOLERANCE = 1  # levels of 255: a value may fall on either side of a rounding edge
BATCHES = (1, 2, 3, 8)
PROMPTS = ("a red circle above a blue square", "A large star,  black background")


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, the largest difference, and the most that is tolerated.

    Differences are absolute, of floats whose largest is above 1 as a share of that. mean: the mean difference; graph: the graph
    it is about, None for all three together; against: what the exported graphs were compared with; levels: differences are
    levels of 255.
    """

    what: str
    error: float
    tolerance: float
    mean: float = 0.0
    graph: str | None = None
    against: Literal["eager", "itself", "diffusers"] = "eager"
    levels: bool = False

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


class Distance(NamedTuple):
    """Absolute differences between two arrays."""

    largest: float
    mean: float


@dataclass(frozen=True)
class Trajectory:
    """The same prompts and noise at one K by the exported graphs and by the diffusers pipeline with the eager decoder.

    size: "WxH" where it is not the student's default. latents float32 [B, C, h, w], images uint8 [B, H, W, 3]; of videos with
    frames after the batch.
    """

    nfe: int
    size: str
    latents: NDArray[Any]
    images: NDArray[Any]
    eager_latents: NDArray[Any]
    eager_images: NDArray[Any]

    def checks(self) -> list[Check]:
        """Latents and pictures, each against diffusers."""
        latents = _worst([self.latents], [self.eager_latents], scaled=True)
        images = _worst([self.images], [self.eager_images])
        named = f"{self.nfe} exported steps equal the diffusers pipeline{self.size and f' at {self.size}'}"
        return [
            Check(named, latents.largest, TOLERANCE, latents.mean, against="diffusers"),
            Check(f"{named}, decoded", images.largest, PIXEL_TOLERANCE, images.mean, against="diffusers", levels=True),
        ]


@dataclass(frozen=True)
class Proof:
    """Everything that was compared, and the trajectories of every K to be looked at."""

    checks: tuple[Check, ...]
    trajectories: tuple[Trajectory, ...]


def verify(student: Student, graphs: list[Graph], folder: Path) -> Proof:
    """Runs every comparison on the exported student in `folder`; the caller must refuse to publish if one has not passed."""
    engine = Engine.open(folder)
    checks: list[Check] = []
    trajectories: list[Trajectory] = []
    shapes = [tuple(shape) for shape in engine.manifest.sizes.values()]
    asked = trajectories_to_check(engine)
    total = sum(len(BATCHES) + 1 + len(other_shapes(graph, shapes)) for graph in graphs) + 2 * len(asked)
    with tqdm(total=total, desc="verifying", dynamic_ncols=True) as bar:

        def add(check: Check) -> None:
            checks.append(check)
            bar.update()

        for graph in graphs:
            bar.set_postfix_str(graph.name)
            for check in compare_graph(graph, engine.sessions[graph.name], shapes):
                add(check)
        decoder = next(graph.module for graph in graphs if graph.name == "vae_decoder")
        for nfe, size in asked:
            bar.set_postfix_str(f"{nfe} NFE against diffusers")
            trajectories.append(compare_trajectory(student, engine, decoder, nfe, size))
            for check in trajectories[-1].checks():
                add(check)
        bar.set_postfix_str("")
        assert bar.n == bar.total
    return Proof(tuple(checks), tuple(trajectories))


def trajectories_to_check(engine: Engine) -> list[tuple[int, str]]:
    """Every NFE count at the default size, and the default NFE count at every other size."""
    default, *others = engine.manifest.sizes
    return [*((nfe, default) for nfe in engine.manifest.nfe), *((engine.manifest.default_nfe, size) for size in others)]


def compare_graph(graph: Graph, session: Session, shapes: list[tuple[int, ...]]) -> Iterator[Check]:
    """ONNX against eager at several batches of the first latent shape, at a batch of two of every other, and each row of the
    largest batch against the same row alone."""
    for batch in BATCHES:
        yield equals_eager(graph, session, graph.example(batch, shapes[0]), f"batch {batch}")
    for shape in other_shapes(graph, shapes):
        yield equals_eager(graph, session, graph.example(2, shape), f"latents {' x '.join(map(str, shape))}")
    yield rows_equal_themselves_alone(graph, session, graph.example(max(BATCHES), shapes[0]))


def other_shapes(graph: Graph, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The latent shapes after the first, for graphs that take latents."""
    return shapes[1:] if "latents" in graph.dynamic else []


def equals_eager(graph: Graph, session: Session, inputs: Tensors, when: str) -> Check:
    """The exported graph and its module on the same inputs."""
    with torch.no_grad():
        eager = graph.module(**inputs)
    eager = eager if isinstance(eager, tuple) else (eager,)
    levels = eager[0].dtype == torch.uint8
    worst = _worst(_run(session, inputs), [theirs.numpy() for theirs in eager], scaled=not levels)
    tolerance = PIXEL_TOLERANCE if levels else TOLERANCE
    return Check(f"{graph.name} equals eager, {when}", worst.largest, tolerance, worst.mean, graph.name, levels=levels)


def rows_equal_themselves_alone(graph: Graph, session: Session, inputs: Tensors) -> Check:
    """Each row of a batch and the same row in a batch of its own, bit for bit."""
    rows = len(next(iter(inputs.values())))
    each = [_run(session, {name: value[row : row + 1] for name, value in inputs.items()}) for row in range(rows)]
    alone = [np.concatenate(outputs) for outputs in zip(*each, strict=True)]
    worst = _worst(_run(session, inputs), alone)
    named = f"{graph.name}: rows of a batch equal the row alone, bit for bit"
    return Check(named, worst.largest, 0.0, worst.mean, graph.name, "itself")


def compare_trajectory(student: Student, engine: Engine, decoder: torch.nn.Module, nfe: int, size: str) -> Trajectory:
    """`nfe` exported steps and the diffusers pipeline's own, with the same noise and prompts, both decoded."""
    shape = engine.manifest.sizes[size]
    noise = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(nfe)) * engine.manifest.init_noise_sigma
    latents = exported_latents(engine, noise.numpy(), nfe, size)
    (images,) = engine.sessions["vae_decoder"].run({"latents": latents})
    eager = diffusers_latents(student, list(PROMPTS), noise, nfe)
    with torch.no_grad():
        eager_images: torch.Tensor = decoder(torch.from_numpy(eager))
    default = size == next(iter(engine.manifest.sizes))
    return Trajectory(nfe, "" if default else size, latents, images, eager, eager_images.numpy())


def exported_latents(engine: Engine, noise: NDArray[Any], nfe: int, size: str) -> NDArray[Any]:
    """What the engine makes of PROMPTS and noise float32 [B, ...] after `nfe` NFEs, not yet decoded: shaped as the noise."""
    batch = [engine.prepare(Request(prompt, 0, row, nfe, size)) for row, prompt in enumerate(PROMPTS)]
    for row, member in enumerate(batch):
        member.latents = noise[row : row + 1]
    for _ in range(nfe):
        if error := next((error for error in engine.step(batch) if error), None):
            raise error
    return np.concatenate([member.latents for member in batch])


def _run(session: Session, inputs: Tensors) -> list[NDArray[Any]]:
    return session.run({name: value.numpy() for name, value in inputs.items()})


def _worst(ours: list[NDArray[Any]], theirs: list[NDArray[Any]], scaled: bool = False) -> Distance:
    """Over all outputs; numpy's maximum, because Python's loses a NaN that does not come first.

    scaled: in units of each output's largest value where that is above 1, since rounding grows with it.
    """
    assert all(one.shape == other.shape for one, other in zip(ours, theirs, strict=True))
    differences = [np.abs(one.astype(np.float64) - other) for one, other in zip(ours, theirs, strict=True)]
    if scaled:
        differences = [d / max(1.0, float(np.abs(other).max())) for d, other in zip(differences, theirs, strict=True)]
    return Distance(float(np.max([d.max() for d in differences])), float(np.mean([d.mean() for d in differences])))

"""The proof that exported graphs equal PyTorch: graph by graph, end to end against diffusers, and row by row in batches.

A student in half precision is compared twice: with PyTorch in the same arithmetic, which finds wrong graphs, and with itself in
float32, which tells what half precision costs. onnxruntime computes no bfloat16 on CPU. There the same graph is computed in
float32 (export/bfloat16.py) and held to eager float32 over the weights as bfloat16 rounds them; what bfloat16 costs is then
eager's own difference.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from export.bfloat16 import widened_student
from export.comparison import Check, Pictures, Proof, Trajectory, coarsest, compared, largest_difference
from export.graphs import Graph, Tensors
from export.reference import diffusers_latents
from server.engine.engine import Engine
from server.engine.request import Request
from server.engine.session import Session
from server.engine.student import GraphName, Precision, open_student
from tdm_train.checkpoint import Student

BATCHES = (1, 2, 3, 8)
PROMPTS = ("a red circle above a blue square", "A large star,  black background")


@dataclass(frozen=True)
class Form:
    """A student in some precision, its graphs, and its decoder in one piece: latents -> pixels [B, ...]."""

    student: Student
    graphs: dict[GraphName, Graph]
    decoder: torch.nn.Module

    def pictures(self, noise: torch.Tensor, nfe: int) -> Pictures:
        """What the diffusers pipeline and the eager decoder make of PROMPTS and noise [B, ...]."""
        latents = diffusers_latents(self.student, list(PROMPTS), noise, nfe)
        with torch.no_grad():
            images: torch.Tensor = self.decoder(torch.from_numpy(latents))
        return Pictures(latents, images.numpy())


@dataclass(frozen=True)
class Forms:
    """The student as it was trained; as it is exported; and as onnxruntime computes it here, where bf16 becomes float32."""

    float32: Form
    exported: Form
    here: Form

    def half(self, exported: Pictures, noise: torch.Tensor, nfe: int, precision: Precision) -> Pictures:
        """What the student makes in its own arithmetic: onnxruntime's, or eager's where onnxruntime lacks it."""
        return self.exported.pictures(noise, nfe) if precision == "bf16" else exported


def verify(forms: Forms, folder: Path) -> Proof:
    """Runs every comparison on the exported student in `folder`; the caller must refuse to publish if one has not passed."""
    opened = open_student(folder)
    precisions = opened.manifest.precision
    engine = Engine.of(widened_student(opened))
    checks: list[Check] = []
    trajectories: list[Trajectory] = []
    shapes = [tuple(shape) for shape in engine.manifest.sizes.values()]
    asked, worst = trajectories_to_check(engine), coarsest(precisions.values())
    with tqdm(total=count_checks(forms, shapes, precisions, len(asked)), desc="verifying", dynamic_ncols=True) as bar:

        def add(check: Check) -> None:
            checks.append(check)
            bar.update()

        for name, precision in precisions.items():
            bar.set_postfix_str(name)
            for check in compare_graph(forms.here.graphs[name], engine.sessions[name], shapes, precision):
                add(check)
            for check in compare_with_float32(forms, engine.sessions[name], name, shapes, precision):
                add(check)
        for nfe, size in asked:
            bar.set_postfix_str(f"{nfe} NFE against diffusers")
            trajectories.append(compare_trajectory(forms, engine, worst, nfe, size))
            for check in trajectories[-1].checks():
                add(check)
        bar.set_postfix_str("")
        assert bar.n == bar.total
    return Proof(tuple(checks), tuple(trajectories))


def count_checks(
    forms: Forms, shapes: list[tuple[int, ...]], precisions: Mapping[GraphName, Precision], trajectories: int
) -> int:
    """How many checks `verify` is about to make."""
    total = 2 * trajectories * (1 if coarsest(precisions.values()) == "fp32" else 2)
    for name, precision in precisions.items():
        others = len(other_shapes(forms.float32.graphs[name], shapes))
        graph = forms.float32.graphs[name]
        total += (len(BATCHES) + others + 1 if graph.dynamic else 1) + (0 if precision == "fp32" else 1 + others)
    return total


def trajectories_to_check(engine: Engine) -> list[tuple[int, str]]:
    """Every NFE count at the default size, and the default NFE count at every other size."""
    default, *others = engine.manifest.sizes
    return [*((nfe, default) for nfe in engine.manifest.nfe), *((engine.manifest.default_nfe, size) for size in others)]


def compare_graph(
    graph: Graph, session: Session, shapes: list[tuple[int, ...]], precision: Precision = "fp32"
) -> Iterator[Check]:
    """ONNX against eager at several batches of the first latent shape, at a batch of two of every other, and each row of the
    largest batch against the same row alone."""
    for batch in sorted(set(map(graph.batch, BATCHES))):
        yield equalseager(graph, session, graph.example(batch, shapes[0]), f"batch {batch}", precision)
    for shape in other_shapes(graph, shapes):
        yield equalseager(graph, session, graph.example(2, shape), f"latents {' x '.join(map(str, shape))}", precision)
    if graph.dynamic:
        yield rows_equal_themselves_alone(graph, session, graph.example(max(BATCHES), shapes[0]))


def compare_with_float32(
    forms: Forms, session: Session, name: GraphName, shapes: list[tuple[int, ...]], precision: Precision
) -> Iterator[Check]:
    """What half precision costs a graph, at a batch of two of every latent shape: the exported graph, or eager where
    onnxruntime lacks the precision, against eager in float32."""
    if precision == "fp32":
        return
    float32, half = forms.float32.graphs[name], forms.exported.graphs[name].module
    for shape in [shapes[0], *other_shapes(float32, shapes)]:
        inputs = float32.example(float32.batch(2), shape)
        ours = eager(half, inputs) if precision == "bf16" else _run(session, inputs)
        whose = "eager " if precision == "bf16" else ""
        named = f"{whose}{name} in {precision} against eager float32, inputs of {' x '.join(map(str, shape))}"
        yield compared(named, ours, eager(float32.module, inputs), name, precision, "float32")


def other_shapes(graph: Graph, shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The latent shapes after the first, for graphs that take latents."""
    return shapes[1:] if "latents" in graph.dynamic else []


def equalseager(graph: Graph, session: Session, inputs: Tensors, when: str, precision: Precision = "fp32") -> Check:
    """The exported graph and its module on the same inputs."""
    how = {"fp32": "", "fp16": " fp16", "bf16": " over bf16 weights, both in float32"}[precision]
    named = f"{graph.name} equals eager{how}, {when}"
    return compared(named, _run(session, inputs), eager(graph.module, inputs), graph.name, precision, "eager")


def rows_equal_themselves_alone(graph: Graph, session: Session, inputs: Tensors) -> Check:
    """Each row of a batch and the same row in a batch of its own, bit for bit."""
    rows = len(next(iter(inputs.values())))
    each = [_run(session, {name: value[row : row + 1] for name, value in inputs.items()}) for row in range(rows)]
    alone = [np.concatenate(outputs) for outputs in zip(*each, strict=True)]
    worst = largest_difference(_run(session, inputs), alone)
    named = f"{graph.name}: rows of a batch equal the row alone, bit for bit"
    return Check(named, worst.largest, 0.0, worst.mean, graph.name, "itself")


def compare_trajectory(forms: Forms, engine: Engine, precision: Precision, nfe: int, size: str) -> Trajectory:
    """`nfe` exported steps and the diffusers pipeline's own, with the same noise and prompts, both decoded."""
    shape = engine.manifest.sizes[size]
    noise = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(nfe)) * engine.manifest.init_noise_sigma
    latents = exported_latents(engine, noise.numpy(), nfe, size)
    images = np.stack([engine.decode(size, [row[None]])[0] for row in latents])
    shown = "" if size == next(iter(engine.manifest.sizes)) else size
    exported, eager = Pictures(latents, images), forms.here.pictures(noise, nfe)
    if precision == "fp32":
        return Trajectory(nfe, shown, exported, eager)
    half = forms.half(exported, noise, nfe, precision)
    return Trajectory(nfe, shown, exported, eager, precision, half, forms.float32.pictures(noise, nfe))


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


def eager(module: torch.nn.Module, inputs: Tensors) -> list[NDArray[Any]]:
    """What PyTorch makes of the inputs, in the order of the graph's outputs."""
    with torch.no_grad():
        outputs = module(**inputs)
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

"""The proof that exported graphs equal PyTorch: graph by graph, end to end against diffusers, and row by row in batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from export.onnx import Graph
from export.sampler_table import Row
from server.engine.session import session_options, share_threads
from tdm_train.checkpoint import Student
from tdm_train.steps_aware import fold, unfold

TOLERANCE = 1e-4  # absolute, on latents and embeddings of unit scale, float32
PIXEL_TOLERANCE = 1  # levels of 255: a value may fall on either side of a rounding edge
BATCHES = (1, 2, 3, 8)
PROMPTS = ("a red circle above a blue square", "a large star, black background")


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, the largest absolute difference, and the most that is tolerated.

    mean: the mean absolute difference; graph: the graph it is about, None for all three together; against: what the exported
    graphs were compared with; levels: differences are levels of 255.
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


def open_session(file: Path) -> onnxruntime.InferenceSession:
    """A CPU session as the engine has it, where every row of a batch is computed alike."""
    share_threads()
    return onnxruntime.InferenceSession(file.read_bytes(), session_options(), providers=["CPUExecutionProvider"])


class Distance(NamedTuple):
    """Absolute differences between two arrays."""

    largest: float
    mean: float


@dataclass(frozen=True)
class Trajectory:
    """The same prompts and noise at one K by the exported graphs and by the diffusers pipeline with the eager decoder.

    latents float32 [B, C, h, w]; images uint8 [B, H, W, 3].
    """

    nfe: int
    latents: NDArray[Any]
    images: NDArray[Any]
    eager_latents: NDArray[Any]
    eager_images: NDArray[Any]

    def checks(self) -> list[Check]:
        """Latents and pictures, each against diffusers."""
        latents = _worst([self.latents], [self.eager_latents])
        images = _worst([self.images], [self.eager_images])
        named = f"{self.nfe} exported steps equal the diffusers pipeline"
        return [
            Check(named, latents.largest, TOLERANCE, latents.mean, against="diffusers"),
            Check(f"{named}, decoded", images.largest, PIXEL_TOLERANCE, images.mean, against="diffusers", levels=True),
        ]


@dataclass(frozen=True)
class Proof:
    """Everything that was compared, and the trajectories of every K to be looked at."""

    checks: tuple[Check, ...]
    trajectories: tuple[Trajectory, ...]


def verify(student: Student, graphs: list[Graph], folder: Path, tables: dict[str, list[Row]]) -> Proof:
    """Runs every comparison on the ONNX files in `folder`; the caller must refuse to publish if one has not passed."""
    checks: list[Check] = []
    trajectories: list[Trajectory] = []
    with tqdm(total=len(graphs) * (len(BATCHES) + 1) + 2 * len(tables), desc="verifying", dynamic_ncols=True) as bar:

        def add(check: Check) -> None:
            checks.append(check)
            bar.update()

        bar.set_postfix_str("opening the graphs")
        sessions = {graph.name: open_session(folder / f"{graph.name}.onnx") for graph in graphs}
        for graph in graphs:
            bar.set_postfix_str(graph.name)
            for check in compare_graph(graph, sessions[graph.name]):
                add(check)
        decoder = next(graph.module for graph in graphs if graph.name == "vae_decoder")
        for nfe, rows in tables.items():
            bar.set_postfix_str(f"{nfe} NFE against diffusers")
            trajectories.append(compare_trajectory(student, sessions, decoder, int(nfe), rows))
            for check in trajectories[-1].checks():
                add(check)
        bar.set_postfix_str("")
        assert bar.n == bar.total
    return Proof(tuple(checks), tuple(trajectories))


def compare_graph(graph: Graph, session: onnxruntime.InferenceSession) -> Iterator[Check]:
    """ONNX against eager at several batches, and each row of the largest batch against the same row alone."""
    largest = _example(graph, max(BATCHES))
    together = _run(session, largest)
    for batch in BATCHES:
        inputs = _example(graph, batch)
        with torch.no_grad():
            eager = graph.module(*inputs.values())
        eager = eager if isinstance(eager, tuple) else (eager,)
        worst = _worst(_run(session, inputs), [theirs.numpy() for theirs in eager])
        levels = eager[0].dtype == torch.uint8
        tolerance = PIXEL_TOLERANCE if levels else TOLERANCE
        named = f"{graph.name} equals eager, batch {batch}"
        yield Check(named, worst.largest, tolerance, worst.mean, graph.name, levels=levels)
    rows = [_run(session, {name: value[row : row + 1] for name, value in largest.items()}) for row in range(max(BATCHES))]
    alone = [np.concatenate([row[i] for row in rows]) for i in range(len(graph.outputs))]
    worst = _worst(together, alone)
    named = f"{graph.name}: rows of a batch equal the row alone, bit for bit"
    yield Check(named, worst.largest, 0.0, worst.mean, graph.name, "itself")


def compare_trajectory(
    student: Student,
    sessions: dict[str, onnxruntime.InferenceSession],
    decoder: torch.nn.Module,
    nfe: int,
    rows: list[Row],
) -> Trajectory:
    """`nfe` exported steps and the diffusers pipeline's own, with the same noise and prompts, both decoded."""
    noise = torch.randn(len(PROMPTS), *latent_shape(student), generator=torch.Generator().manual_seed(nfe))
    latents = exported_latents(student, sessions, noise, nfe, rows)
    (images,) = sessions["vae_decoder"].run(None, {"latents": latents})
    eager = diffusers_latents(student, list(PROMPTS), noise, nfe)
    with torch.no_grad():
        eager_images: torch.Tensor = decoder(torch.from_numpy(eager))
    return Trajectory(nfe, latents, np.asarray(images), eager, eager_images.numpy())


def exported_latents(
    student: Student,
    sessions: dict[str, onnxruntime.InferenceSession],
    noise: torch.Tensor,
    nfe: int,
    rows: list[Row],
) -> NDArray[Any]:
    """What the exported graphs make of PROMPTS at one K: float32 [B, C, h, w], not yet decoded."""
    batch, length = len(PROMPTS), student.description.text_length
    encoded = student.pipeline.tokenizer(list(PROMPTS), padding="max_length", max_length=length, return_tensors="np")
    mask = encoded["attention_mask"].astype(np.int64)
    text_emb = sessions["text_encoder"].run(None, {"tokens": encoded["input_ids"].astype(np.int64), "mask": mask})[0]
    latents, x0 = noise.numpy(), np.zeros_like(noise.numpy())
    for timestep, *coefficients in rows:
        inputs = {
            "latents": latents,
            "x0_prev": x0,
            "timestep": np.full(batch, timestep, np.float32),
            "coefficients": np.tile(np.asarray(coefficients, np.float32), (batch, 1)),
            "nfe": np.full(batch, nfe),
            "text_emb": text_emb,
            "mask": mask,
        }
        latents, x0 = sessions["student_step"].run(None, inputs)
    return latents


def diffusers_latents(student: Student, prompts: list[str], noise: torch.Tensor, nfe: int) -> NDArray[Any]:
    """What diffusers' own pipeline makes of the student at one K: float32 [B, C, h, w], not yet decoded."""
    transformer = student.pipeline.transformer
    vectors = fold(transformer, nfe)
    try:
        latents: torch.Tensor = student.pipeline(
            prompts,
            num_inference_steps=nfe,
            guidance_scale=1.0,
            latents=noise.clone(),
            output_type="latent",
            max_sequence_length=student.description.text_length,
            use_resolution_binning=False,
            clean_caption=False,
        ).images
        return latents.numpy()
    finally:
        unfold(transformer, vectors, nfe)


def latent_shape(student: Student) -> tuple[int, int, int]:
    """(C, h, w) of the student's latents."""
    config = student.pipeline.transformer.config
    return config.in_channels, config.sample_size, config.sample_size


def _example(graph: Graph, batch: int) -> dict[str, torch.Tensor]:
    """Example inputs of any batch size: random values in the ranges of the graph's own examples."""
    generator = torch.Generator().manual_seed(batch)
    picks = torch.randint(0, 2, (batch,), generator=generator)
    return {
        name: torch.randn((batch, *value.shape[1:]), generator=generator) if value.ndim >= 3 else value[picks]
        for name, value in graph.inputs.items()
    }


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, torch.Tensor]) -> list[NDArray[Any]]:
    outputs: list[NDArray[Any]] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return outputs


def _worst(ours: list[NDArray[Any]], theirs: list[NDArray[Any]]) -> Distance:
    """Over all outputs; numpy's maximum, because Python's loses a NaN that does not come first."""
    differences = [np.abs(one.astype(np.float64) - other) for one, other in zip(ours, theirs, strict=True)]
    assert all(one.shape == other.shape for one, other in zip(ours, theirs, strict=True))
    return Distance(float(np.max([d.max() for d in differences])), float(np.mean([d.mean() for d in differences])))

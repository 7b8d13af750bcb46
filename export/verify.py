"""The proof that exported graphs equal PyTorch: graph by graph, end to end against diffusers, and row by row in batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from export.onnx import Graph
from export.sampler_table import Row
from server.engine.session import session_options, share_threads
from tdm_train.checkpoint import Student
from tdm_train.steps_aware import fold, unfold

TOLERANCE = 1e-4  # absolute, on latents and embeddings of unit scale, float32
PIXEL_TOLERANCE = 1  # levels of 255: a value may fall on either side of a rounding edge
BATCHES = (1, 2, 3, 8)


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, the largest absolute difference, and the most that is tolerated."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def open_session(file: Path) -> onnxruntime.InferenceSession:
    """A CPU session as the engine has it, where every row of a batch is computed alike."""
    share_threads()
    return onnxruntime.InferenceSession(file.read_bytes(), session_options(), providers=["CPUExecutionProvider"])


def verify(student: Student, graphs: list[Graph], folder: Path, tables: dict[str, list[Row]]) -> list[Check]:
    """Runs every comparison on the ONNX files in `folder`; the caller must refuse to publish if one has not passed."""
    sessions = {graph.name: open_session(folder / f"{graph.name}.onnx") for graph in graphs}
    checks = [check for graph in graphs for check in compare_graph(graph, sessions[graph.name])]
    checks += [compare_trajectory(student, sessions, int(nfe), rows) for nfe, rows in tables.items()]
    return checks


def compare_graph(graph: Graph, session: onnxruntime.InferenceSession) -> list[Check]:
    """ONNX against eager at several batches, and each row of the largest batch against the same row alone."""
    checks, largest = [], _example(graph, max(BATCHES))
    together = _run(session, largest)
    for batch in BATCHES:
        inputs = _example(graph, batch)
        with torch.no_grad():
            eager = graph.module(*inputs.values())
        eager = eager if isinstance(eager, tuple) else (eager,)
        error = max(_distance(ours, theirs.numpy()) for ours, theirs in zip(_run(session, inputs), eager, strict=True))
        tolerance = PIXEL_TOLERANCE if eager[0].dtype == torch.uint8 else TOLERANCE
        checks.append(Check(f"{graph.name} equals eager, batch {batch}", error, tolerance))
    rows = [_run(session, {name: value[row : row + 1] for name, value in largest.items()}) for row in range(max(BATCHES))]
    alone = [np.concatenate([row[i] for row in rows]) for i in range(len(graph.outputs))]
    difference = max(_distance(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
    return [*checks, Check(f"{graph.name}: rows of a batch equal the row alone, bit for bit", difference, 0.0)]


def compare_trajectory(student: Student, sessions: dict[str, onnxruntime.InferenceSession], nfe: int, rows: list[Row]) -> Check:
    """Latents after `nfe` exported steps against the diffusers pipeline's own, with the same noise and prompts."""
    prompts = ["a red circle above a blue square", "a large star, black background"]
    noise = torch.randn(2, *latent_shape(student), generator=torch.Generator().manual_seed(nfe))
    length = student.description["text_length"]
    encoded = student.pipeline.tokenizer(prompts, padding="max_length", max_length=length, return_tensors="np")
    mask = encoded["attention_mask"].astype(np.int64)
    text_emb = sessions["text_encoder"].run(None, {"tokens": encoded["input_ids"].astype(np.int64), "mask": mask})[0]
    latents, x0 = noise.numpy(), np.zeros_like(noise.numpy())
    for timestep, *coefficients in rows:
        inputs = {
            "latents": latents,
            "x0_prev": x0,
            "timestep": np.full(2, timestep, np.float32),
            "coefficients": np.tile(np.asarray(coefficients, np.float32), (2, 1)),
            "nfe": np.full(2, nfe),
            "text_emb": text_emb,
            "mask": mask,
        }
        latents, x0 = sessions["student_step"].run(None, inputs)
    theirs = diffusers_latents(student, prompts, noise, nfe)
    return Check(f"{nfe} exported steps equal the diffusers pipeline", _distance(latents, theirs), TOLERANCE)


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
            max_sequence_length=student.description["text_length"],
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


def _distance(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())

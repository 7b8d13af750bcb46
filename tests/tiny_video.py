"""Builds a small random exported student of videos, decoded in chunks, in milliseconds and without torch."""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from server.engine.student import NEXT
from tests.tiny_student import (
    BYTE,
    CHANNELS,
    FLOAT,
    SCALE,
    floats,
    model,
    student_step,
    text_encoder,
    tiny_manifest,
    tokenizer,
    write_manifest,
)

NAME, FPS = "tiny-video", 8


def build_tiny_video(repository: Path, size: str = "64x32", chunks: tuple[int, ...] = (3, 2, 2)) -> Path:
    """Writes `repository/tiny-video` and returns it. As CogVideoX's: 4 frames per latent frame, and 1 for the first if the
    first chunk has an odd number."""
    version = repository / NAME / "1"
    version.mkdir(parents=True)
    rng = np.random.default_rng(0)
    width, height = (int(side) // SCALE for side in size.split("x"))
    kernel = floats(rng, CHANNELS, 3, SCALE, SCALE)
    graphs = {"text_encoder": text_encoder(rng), "student_step": student_step(rng, video=True)}
    for graph, frames in (("vae_decoder", chunks[0]), (NEXT, chunks[1])):
        graphs[graph] = chunk_decoder(kernel, (frames, CHANNELS, height, width), first=graph != NEXT)
    for graph, contents in graphs.items():
        onnx.save(contents, version / f"{graph}.onnx")
    tokenizer().save(str(version / "tokenizer.json"))
    files = (*(f"{graph}.onnx" for graph in graphs), "tokenizer.json")
    fields = tiny_manifest(version, NAME, files) | {
        "media_type": "video",
        "sizes": {size: [sum(chunks), CHANNELS, height, width]},
        "frames": 4 * sum(chunks) - 3 * (chunks[0] % 2),
        "fps": FPS,
        "chunks": list(chunks),
        "precision": dict.fromkeys(graphs, "fp32"),
    }
    write_manifest(repository / NAME, fields)
    return repository / NAME


def chunk_decoder(kernel: np.ndarray, latents: tuple[int, ...], first: bool) -> onnx.ModelProto:
    """One transposed convolution per latent frame, whose colours the state shifts: the mean of all latent frames before, in
    4 numbers."""
    frames = latents[0]
    alone = 1 if first and frames % 2 else 0
    nodes = [
        helper.make_node("Squeeze", ["latents", "batch"], ["each"]),
        helper.make_node("ConvTranspose", ["each", "kernel"], ["raw"], strides=[SCALE, SCALE]),
        helper.make_node("ReduceMean", ["latents", "but_channels"], ["mean"], keepdims=0),
        *([] if first else [helper.make_node("Add", ["mean", "state"], ["next_state"])]),
        *([helper.make_node("Identity", ["mean"], ["next_state"])] if first else []),
        helper.make_node("ReduceMean", ["next_state" if first else "state"], ["shift"], keepdims=0),
        helper.make_node("Add", ["raw", "shift"], ["shifted"]),
        helper.make_node("Tanh", ["shifted"], ["bounded"]),
        helper.make_node("Add", ["bounded", "one"], ["positive"]),
        helper.make_node("Mul", ["positive", "half_range"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["rounded"]),
        helper.make_node("Cast", ["rounded"], ["bytes"], to=BYTE),
        helper.make_node("Transpose", ["bytes"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Gather", ["last", "times"], ["repeated"]),
        helper.make_node("Unsqueeze", ["repeated", "batch"], ["image"]),
    ]
    constants = {
        "kernel": kernel,
        "batch": np.array([0]),
        "but_channels": np.array([1, 3, 4]),
        "one": np.float32(1),
        "half_range": np.float32(127.5),
        "times": np.array([*range(alone), *np.repeat(np.arange(alone, frames), 4)]),
    }
    inputs = {"latents": (FLOAT, [1, *latents])} | ({} if first else {"state": (FLOAT, [1, CHANNELS])})
    pixels = [1, len(constants["times"]), latents[2] * SCALE, latents[3] * SCALE, 3]
    return model(nodes, inputs, {"image": (BYTE, pixels), "next_state": (FLOAT, [1, CHANNELS])}, constants)

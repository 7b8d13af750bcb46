"""PyTorch modules -> ONNX files with named, dynamic dimensions and half-precision weights on disk."""

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.graphs import StudentStep, TextEncoder, VaeDecoder
from tdm_train.checkpoint import Student


@dataclass(frozen=True)
class Graph:
    """One graph to export: its module in float32 evaluation mode, example inputs by name, outputs, dynamic dimensions."""

    name: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]


def student_graphs(student: Student, max_batch: int) -> list[Graph]:
    """The three graphs of a student with random example inputs (batch 2)."""
    transformer, length = student.pipeline.transformer.config, student.description.text_length
    latents = torch.randn(2, transformer.in_channels, transformer.sample_size, transformer.sample_size)
    mask = torch.ones(2, length, dtype=torch.int64)
    step_inputs = {
        "latents": latents,
        "x0_prev": torch.randn_like(latents),
        "timestep": torch.tensor([999.0, 499.0]),
        "coefficients": torch.randn(2, 3),
        "nfe": torch.tensor([student.nfe_set[0], student.nfe_set[-1]]),
        "text_emb": torch.randn(2, length, transformer.caption_channels),
        "mask": mask,
    }
    text = {0: "batch", 1: "length"}
    step_dynamic = {name: text if name in ("text_emb", "mask") else {0: "batch"} for name in step_inputs}
    tokens = {"tokens": torch.ones(2, length, dtype=torch.int64), "mask": mask}
    pipeline = student.pipeline
    return [
        Graph("text_encoder", TextEncoder(pipeline.text_encoder), tokens, ("text_emb",), {"tokens": text, "mask": text}),
        Graph("student_step", StudentStep(student.denoiser), step_inputs, ("next_latents", "x0"), step_dynamic),
        Graph("vae_decoder", VaeDecoder(pipeline.vae), {"latents": latents}, ("image",), {"latents": {0: "batch"}}),
    ]


def export_graph(graph: Graph, file: Path, max_batch: int, max_length: int) -> None:
    """Traces a graph and writes it to `file`, all weights inside."""
    bounds = {"batch": (1, max_batch), "length": (2, max_length)}
    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in bounds.items()}
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # names torchvision, not needed
    shapes = tuple({axis: dims[dim] for axis, dim in graph.dynamic[name].items()} for name in graph.inputs)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of torchvision and of its own internals
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
    assert program is not None
    model = without_traces(halve_weights(program.model_proto))
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString())


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Takes out, in place, what the exporter notes for its developers: per node, the stack of source files and lines of the
    machine it ran on."""
    functions = [node for function in model.functions for node in (function, *function.node)]
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer, *functions):
        del part.metadata_props[:]
        part.doc_string = ""
    return model


def halve_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Stores each float32 weight that half precision holds exactly as float16 with a Cast behind it, in place.

    The files shrink to half; runtimes fold the Cast when they load, and compute in float32 as before.
    """
    casts, kept = [], []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        halved = values.astype(np.float16) if values.dtype == np.float32 and values.size >= 64 else None
        if halved is None or not np.array_equal(halved.astype(np.float32), values):
            kept.append(weight)
            continue
        kept.append(numpy_helper.from_array(halved, f"{weight.name}.half"))
        casts.append(helper.make_node("Cast", [f"{weight.name}.half"], [weight.name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:], model.graph.value_info[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    return model

"""PyTorch modules -> ONNX files with named, dynamic dimensions and half-precision weights on disk."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.graphs import Graph


def export_graph(graph: Graph, file: Path, latents: tuple[int, ...]) -> None:
    """Traces a graph, with latents of this shape as its example, and writes it to `file`, all weights inside."""
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # names torchvision, not needed
    inputs = graph.example(2, latents)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of torchvision and of its own internals
        program = torch.onnx.export(
            graph.module.eval(),
            (),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes={name: graph.dynamic[name] for name in inputs},
            input_names=list(inputs),
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

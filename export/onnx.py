"""PyTorch modules -> ONNX files with named, dynamic dimensions, half-precision weights on disk, and large weights in a file of
their own."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from export.graphs import Graph
from server.engine.student import weights_of

ONE_FILE_BYTES = 1 << 28  # weights beyond it go to a file of their own; protobuf ends at 2 GB, and copies what it holds
FEWEST_VALUES = 64  # smaller weights are not worth a node or an entry


def export_graph(graph: Graph, file: Path, latents: tuple[int, ...], one_file_bytes: int | None = None) -> None:
    """Traces a graph, with latents of this shape as its example, and writes it to `file`.

    Weights of more than `one_file_bytes` (ONE_FILE_BYTES) in all are written to weights_of(file), one after the other, so that
    no second copy of them is ever in memory.
    """
    model = traced(graph, latents)
    halve_weights(model)
    weights = [value for value in model.graph.initializers.values() if known(value).size >= FEWEST_VALUES]
    if sum(known(value).nbytes for value in weights) > (ONE_FILE_BYTES if one_file_bytes is None else one_file_bytes):
        apart = ir.external_data.convert_tensors_to_external(
            [known(value) for value in weights], file.parent, weights_of(file.name)
        )
        for value, tensor in zip(weights, apart, strict=True):
            value.const_value = tensor
    file.write_bytes(without_traces(ir.to_proto(model)).SerializeToString())
    onnx.checker.check_model(str(file))


def traced(graph: Graph, latents: tuple[int, ...]) -> ir.Model:
    """The graph in ONNX's terms. Its weights are still PyTorch's own tensors."""
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # names torchvision, not needed
    inputs = graph.example(graph.batch(2), latents)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of torchvision and of its own internals
        program = torch.onnx.export(
            graph.module.eval(),
            (),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes={name: graph.dynamic.get(name) for name in inputs},
            input_names=list(inputs),
            output_names=list(graph.outputs),
            verbose=False,
        )
    assert program is not None
    return program.model


def known(initializer: ir.Value) -> ir.TensorProtocol:
    """The values of an initialiser."""
    assert initializer.const_value is not None
    return initializer.const_value


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Takes out, in place, what the exporter notes for its developers: per node, the stack of source files and lines of the
    machine it ran on. Types of inner values go too: they say nothing that runtimes do not find out."""
    functions = [node for function in model.functions for node in (function, *function.node)]
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer, *functions):
        del part.metadata_props[:]
        part.doc_string = ""
    del model.graph.value_info[:]
    return model


def halve_weights(model: ir.Model) -> None:
    """Stores each float32 weight that half precision holds exactly as float16 with a Cast behind it, in place.

    The files shrink to half; runtimes fold the Cast when they load, and compute in float32 as before.
    """
    casts = []
    for weight in list(model.graph.initializers.values()):
        tensor = known(weight)
        if tensor.dtype != ir.DataType.FLOAT or tensor.size < FEWEST_VALUES or not exact_in_half(tensor):
            continue
        half = ir.Value(name=f"{weight.name}.half", const_value=halved(tensor))
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
        weight.replace_all_uses_with(cast.outputs[0])
        cast.outputs[0].name = weight.name
        model.graph.initializers.pop(str(weight.name))
        model.graph.register_initializer(half)
        casts.append(cast)
    if casts:
        model.graph.insert_before(model.graph[0], casts)


def as_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """The values of an ONNX tensor: a module's weight itself, or a copy of a constant that the exporter made."""
    return tensor.raw if isinstance(tensor.raw, torch.Tensor) else torch.from_numpy(tensor.numpy().copy())


def exact_in_half(tensor: ir.TensorProtocol) -> bool:
    values = as_torch(tensor).detach()
    return torch.equal(values.half().float(), values)


def halved(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The values in float16, made when they are written."""
    return ir.LazyTensor(
        lambda: ir.tensor(as_torch(tensor).detach().half()),
        ir.DataType.FLOAT16,
        ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )

"""One ONNX graph -> one TensorRT plan, or one readable reason why not. Needs neither torch nor, for `tensorrt_rtx`, a GPU."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from export.onnx_shapes import folded, inferred
from server.engine.engine_plan import Precision, Recipe
from server.engine.shapes import Shape
from server.engine.tensorrt_log import log_of

PRECISIONS: dict[str, Precision] = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}
OTHER_WAY = "or serve it with --provider cuda"


def build_plan(trt: Any, recipe: Recipe, model: onnx.ModelProto, file: Path, monitor: Any = None) -> tuple[bytes, Precision]:
    """The plan of a graph, and the precision of most of its layers.

    file: where the model comes from, beside which its weights may lie; monitor: a trt.IProgressMonitor, if somebody watches.
    Raises ValueError with the graph, the node, its shapes and the way out.
    """
    log = log_of(trt)
    log.said()  # forgets what earlier graphs were told
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    model = bytes_last(model)
    if not parser.parse(model.SerializeToString(), str(file)):
        raise ValueError(parse_error(parser, recipe, model))
    plan = builder.build_serialized_network(network, configuration(trt, builder, recipe, monitor))
    if plan is None:
        raise ValueError(build_error(log.said(), recipe, model))
    return bytes(plan), precision_of(network)


def configuration(trt: Any, builder: Any, recipe: Recipe, monitor: Any) -> Any:
    """The recipe as a builder configuration."""
    configuration = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, shape in recipe.profile.items():
        profile.set_shape(name, shape.min, shape.opt, shape.max)
    configuration.add_optimization_profile(profile)
    configuration.builder_optimization_level = recipe.settings.optimisation_level
    flags = {trt.BuilderFlag.TF32: recipe.settings.tf32, trt.BuilderFlag.STRICT_NANS: recipe.settings.strict_nans}
    for flag, wanted in flags.items():
        (configuration.set_flag if wanted else configuration.clear_flag)(flag)
    if recipe.package == "tensorrt_rtx":  # the other builds for the GPU at hand and for no other
        configuration.num_compute_capabilities = len(recipe.targets)
        for index, target in enumerate(recipe.targets):
            configuration.set_compute_capability(getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}"), index)
    if monitor is not None:
        configuration.progress_monitor = monitor
    return configuration


def precision_of(network: Any) -> Precision:
    """What most layers compute in."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    kinds = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs)
    return PRECISIONS[max(PRECISIONS, key=lambda kind: kinds[kind])]


def bytes_last(model: onnx.ModelProto) -> onnx.ModelProto:
    """Exchanges, in place, a Cast to uint8 with the Transpose behind it: TensorRT has uint8 at a graph's edge alone."""
    nodes = {output: node for node in model.graph.node for output in node.output}
    for output in model.graph.output:
        transpose = nodes.get(output.name)
        cast = nodes.get(transpose.input[0]) if transpose is not None and transpose.op_type == "Transpose" else None
        if transpose is None or cast is None or cast.op_type != "Cast":
            continue
        if output.type.tensor_type.elem_type == TensorProto.UINT8:
            transpose.input[0], cast.input[0] = cast.input[0], f"{output.name}.float"
            transpose.output[0], cast.output[0] = f"{output.name}.float", output.name
            model.graph.node.remove(cast)
            model.graph.node.append(cast)
            del model.graph.value_info[:]
    return model


def parse_error(parser: Any, recipe: Recipe, model: onnx.ModelProto) -> str:
    """What the parser could not read: the first node, with what comes into it."""
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    assert errors, "TensorRT has refused a graph without a word"
    first, more = errors[0], f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    where = [node for node in model.graph.node if node.name == first.node_name()]
    said = " ".join(first.desc().split())
    way_out = f"change that node in export/graphs.py and export again, {OTHER_WAY}"
    return f"{said_by(recipe)}: {described(where, recipe, model) or first.node_name()}: {said}{more}; {way_out}"


def build_error(said: str, recipe: Recipe, model: onnx.ModelProto) -> str:
    """What the builder could not compile: the nodes that it names, with what comes into them."""
    where = [node for node in model.graph.node if f"'{node.name}'" in said]
    ranges = ", ".join(f"{name} {list(shape.min)} to {list(shape.max)}" for name, shape in recipe.profile.items())
    nodes = described(where, recipe, model) or f"inputs {ranges}"
    return f"{said_by(recipe)}: {nodes}: {said}; leave out that GPU with --target, export in another precision, {OTHER_WAY}"


def described(nodes: list[onnx.NodeProto], recipe: Recipe, model: onnx.ModelProto) -> str:
    """Nodes in words, with types and shapes of what comes into them."""
    words = in_words(model, recipe.usual)
    inputs = [", ".join(f"{name} {words.get(name, 'of unknown shape')}" for name in node.input if name) for node in nodes]
    return "; ".join(f"node {node.name} ({node.op_type} of {said})" for node, said in zip(nodes, inputs, strict=True))


def text_shapes(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """What a text encoder makes of a prompt: name -> shape [1, ...], inputs included. Raises ValueError where the graph leaves
    that open."""
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    known = inferred(model, shapes)
    if not all(all(known[name][1]) for name in names):
        known = inferred(folded(model, shapes), shapes)
    text = {name: tuple(known[name][1]) for name in names}
    if unknown := [name for name, shape in text.items() if not all(shape)]:
        raise ValueError(f"text_encoder.onnx does not say how large {', '.join(unknown)} will be; {OTHER_WAY}")
    return text


def in_words(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Tensor name -> its type and shape in words, for inputs of these shapes."""
    return {
        name: f"{TensorProto.DataType.Name(kind).lower()} [{', '.join(str(dim or '?') for dim in dims)}]"
        for name, (kind, dims) in inferred(model, shapes).items()
    }


def said_by(recipe: Recipe) -> str:
    return f"{recipe.graph}.onnx: {recipe.package} {recipe.version} cannot build it for {', '.join(recipe.targets)}"

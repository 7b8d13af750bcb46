"""What every tensor of an ONNX graph is, once its inputs have shapes."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime
from onnx import helper, shape_inference

from server.engine.session import PROVIDER, first_line, session_options, share_threads
from server.engine.shapes import DYNAMIC, Shape


def declared(model: onnx.ModelProto) -> dict[str, Shape]:
    """Input name -> dimensions, DYNAMIC where the graph leaves them free."""
    return {
        value.name: tuple(dim.dim_value if dim.HasField("dim_value") else DYNAMIC for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }


def inferred(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> dict[str, tuple[int, list[int]]]:
    """Tensor name -> type and dimensions, 0 where a dimension cannot be told. shapes: of the inputs."""
    graph = shape_inference.infer_shapes(with_shapes(model, shapes), data_prop=True).graph
    weights = {weight.name: (weight.data_type, list(weight.dims)) for weight in graph.initializer}
    values = {
        value.name: (value.type.tensor_type.elem_type, [dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    return weights | values


def with_shapes(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> onnx.ModelProto:
    """The graph for inputs of these shapes and no others; what was known of other tensors is left out."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.input:
        tensor = value.type.tensor_type
        tensor.CopyFrom(helper.make_tensor_type_proto(tensor.elem_type, shapes[value.name]).tensor_type)
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    return fixed


def folded(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> onnx.ModelProto:
    """The graph for inputs of these shapes, with onnxruntime's folding of all that follows from them: ONNX's own inference
    stops at shapes that a graph computes. Raises ValueError for a graph that onnxruntime's CPU provider does not load."""
    share_threads()
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        try:
            onnxruntime.InferenceSession(with_shapes(model, shapes).SerializeToString(), options, [PROVIDER])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise ValueError(f"onnxruntime cannot load the graph: {first_line(error)}") from None
        return onnx.load(options.optimized_model_filepath)

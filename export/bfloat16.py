"""A bfloat16 graph with float32 in place of bfloat16, for runtimes that do not compute it.

bfloat16 is the upper half of a float32, so every weight keeps its value and the nodes stay as they are: what such a graph
computes differs from the original in the rounding between its nodes alone.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from server.engine.student import Contents, ExportedStudent, weights_of


def widened_student(student: ExportedStudent) -> ExportedStudent:
    """An exported student whose bf16 graphs are computed in float32."""
    files, precisions = dict(student.files), dict(student.manifest.precision)
    for graph, precision in student.manifest.precision.items():
        if precision == "bf16":
            file = f"{graph}.onnx"
            model = onnx.load_model_from_string(bytes(files[file]))
            if weights_of(file) in files:
                files[weights_of(file)] = widened_weights(model, files[weights_of(file)])
            files[file] = widened(model).SerializeToString()
            precisions[graph] = "fp32"
    return ExportedStudent(student.manifest.model_copy(update={"precision": precisions}), files, student.folder)


def widened_weights(model: onnx.ModelProto, weights: Contents) -> bytearray:
    """The bytes of the weights that a model keeps in another file, bfloat16 as float32; tells the model their new places."""
    wide, given = bytearray(), memoryview(weights)
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        told = {entry.key: entry for entry in tensor.external_data}
        begin, length = int(told["offset"].value), int(told["length"].value)
        values = given[begin : begin + length]
        told["offset"].value = str(len(wide))
        if tensor.data_type == TensorProto.BFLOAT16:
            wide += (np.frombuffer(values, "<u2").astype("<u4") << 16).tobytes()
            tensor.data_type = TensorProto.FLOAT
        else:
            wide += values
        told["length"].value = str(len(wide) - int(told["offset"].value))
    return wide


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turns every bfloat16 weight, constant, cast and type of a model into float32, in place."""
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in model.graph.initializer:
        widen_tensor(tensor)
    for attribute in attributes([*model.graph.node, *(node for function in model.functions for node in function.node)]):
        widen_tensor(attribute.t)
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
    return model


def attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.AttributeProto]:
    """The attributes of nodes and of those in their subgraphs."""
    for node in nodes:
        for attribute in node.attribute:
            yield attribute
            yield from attributes(attribute.g.node)


def widen_tensor(tensor: TensorProto) -> None:
    """A bfloat16 tensor -> float32, in place; others stay."""
    if tensor.data_type == TensorProto.BFLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

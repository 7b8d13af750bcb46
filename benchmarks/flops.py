"""Floating-point operations of an ONNX graph: those of matrix products and convolutions, two per multiply-add.

What else a graph does is left out, so a floor that is computed from this is never too high.
"""

from collections.abc import Mapping
from math import prod

import onnx

from export.onnx_shapes import folded, inferred
from server.engine.shapes import Shape


def matrix_flops(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> float:
    """For inputs of these shapes. Raises ValueError where a product's shape cannot be told, and for a graph in bfloat16."""
    static = folded(model, shapes)
    known = {name: dims for name, (_, dims) in inferred(static, shapes).items()}
    return sum(flops(node, known) for node in static.graph.node)


def flops(node: onnx.NodeProto, known: Mapping[str, list[int]]) -> float:
    """Of one node; 0 for one that multiplies no matrices."""
    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return 0.0
    first, second, out = (known.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if not (first and second and out and all((*first, *second, *out))):
        raise ValueError(f"node {node.name} ({node.op_type}): its shapes cannot be told")
    if node.op_type == "MatMul":
        return 2.0 * prod(out) * first[-1]
    if node.op_type == "Gemm":
        turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return 2.0 * prod(out) * first[0 if turned else 1]
    # Each element of a convolution's output, of a transposed one's input, meets the kernel once for every other channel.
    elements = out if node.op_type == "Conv" else first
    return 2.0 * prod(elements) * prod(second[1:])

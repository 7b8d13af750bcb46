"""The floor of a benchmark stands on these counts, so they are those of torch's own counter."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import flops, matrix_flops

WEIGHTS = {"conv": (6, 4, 3, 3), "grouped": (6, 2, 3, 3), "up": (6, 5, 2, 2), "linear": (5, 7), "last": (3, 7)}


def in_onnx() -> onnx.ModelProto:
    """A convolution, a grouped one, a transposed one, a linear layer, and a product of matrices."""
    nodes = [
        helper.make_node("Conv", ["latents", "conv"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Conv", ["a", "grouped"], ["b"], pads=[1, 1, 1, 1], group=3),
        helper.make_node("ConvTranspose", ["b", "up"], ["c"], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "linear"], ["f"]),
        helper.make_node("Gemm", ["f", "last"], ["out"], transB=1),
    ]
    weights = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, [0.0] * torch.Size(shape).numel()) for name, shape in WEIGHTS.items()
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("latents", ["batch", 4, 8, 8]), ("out", ["batch", 3]))
    ]
    graph = helper.make_graph(nodes, "mixed", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def in_torch(latents: torch.Tensor) -> torch.Tensor:
    """The same."""
    conv, grouped, up, linear, last = (torch.zeros(shape) for shape in WEIGHTS.values())
    convolved = F.conv2d(F.conv2d(latents, conv, padding=1, stride=2), grouped, padding=1, groups=3)
    return F.conv_transpose2d(convolved, up, stride=2).mean((2, 3)) @ linear @ last.T


@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_has_as_many_operations_as_torch_counts(batch: int) -> None:
    with FlopCounterMode(display=False) as counter:
        in_torch(torch.zeros(batch, 4, 8, 8))
    assert matrix_flops(in_onnx(), {"latents": (batch, 4, 8, 8)}) == counter.get_total_flops()


def test_a_product_of_unknown_shape_is_named() -> None:
    node = helper.make_node("MatMul", ["one", "two"], ["out"], name="product")
    with pytest.raises(ValueError, match=r"node product \(MatMul\): its shapes cannot be told"):
        flops(node, {"one": [2, 0], "two": [3, 4], "out": [2, 4]})

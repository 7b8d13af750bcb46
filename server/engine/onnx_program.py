"""A graph on onnxruntime that reads and writes memory of the device itself, by I/O binding."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from server.engine.device_runtime import DeviceTensor, TensorSpec, Work
from server.engine.errors import StudentError
from server.engine.shapes import DYNAMIC, Shape

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


class OnnxProgram:
    """Implements device_runtime.Program. Not capturable: onnxruntime may allocate and copy whenever it runs."""

    capturable = False

    def __init__(self, graph: str, session: ort.InferenceSession, device: str) -> None:
        """device: as onnxruntime names it, "cuda" or "cpu". Raises StudentError for a type that numpy does not have."""
        self.session, self.device = session, device
        self.inputs = {node.name: spec(graph, node) for node in session.get_inputs()}
        self.outputs = {node.name: spec(graph, node) for node in session.get_outputs()}
        self.options = ort.RunOptions()
        if device != "cpu":  # what comes next is asked for on the same stream, so nobody has to wait here
            self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def output_shapes(self, inputs: Mapping[str, DeviceTensor]) -> dict[str, Shape]:
        """See device_runtime.Program: a run whose outputs onnxruntime makes room for."""
        binding = self.session.io_binding()
        for name in self.inputs:
            binding.bind_input(name, *self.where(inputs[name]))
        for name in self.outputs:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding)
        return {name: tuple(value.shape()) for name, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> Work:
        """See device_runtime.Program."""
        binding = self.session.io_binding()
        for name in self.inputs:
            binding.bind_input(name, *self.where(tensors[name]))
        for name in self.outputs:
            binding.bind_output(name, *self.where(tensors[name]))
        return lambda: self.session.run_with_iobinding(binding, self.options)

    def where(self, tensor: DeviceTensor) -> tuple[str, int, Any, list[int], int]:
        """A tensor as I/O binding wants to be told."""
        return self.device, 0, tensor.dtype.type, list(tensor.shape), tensor.address


def spec(graph: str, node: ort.NodeArg) -> TensorSpec:
    """What onnxruntime says of an input or output; dimensions that have a name are dynamic."""
    if node.type not in TYPES:
        raise StudentError(f"{graph}.onnx: {node.name} is a {node.type}; legal at a graph's edge: {', '.join(TYPES)}")
    return TensorSpec(np.dtype(TYPES[node.type]), tuple(dim if isinstance(dim, int) else DYNAMIC for dim in node.shape))

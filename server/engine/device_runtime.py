"""The one seam to an accelerator: memory, copies, launches, and graphs loaded to run there.

CudaRuntime (cuda_runtime.py) is the real one. Everything above it, device_session.py and device_step.py, knows addresses and
bytes alone, and is tested with numpy in the place of the device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from server.engine.shapes import Shape
from server.engine.student import Contents

Array = npt.NDArray[Any]
Work = Callable[[], None]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output as its graph declares it; dims has DYNAMIC where a dimension is free."""

    dtype: np.dtype[Any]
    dims: Shape


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor at an address of the device's memory."""

    address: int
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the first dimension being the batch."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    def row(self, index: int) -> int:
        """The address of a row."""
        assert 0 <= index < self.shape[0]
        return self.address + index * self.row_bytes


class Program(Protocol):
    """A graph loaded on a device. capturable: whether its work may become a launch of one piece."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    capturable: bool

    def output_shapes(self, inputs: Mapping[str, DeviceTensor]) -> dict[str, Shape]:
        """Output name -> shape for these inputs, which are read."""
        ...

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> Work:
        """What enqueues one run over these tensors, all inputs and outputs by name."""
        ...


class DeviceRuntime(Protocol):
    """One device and one stream: everything is carried out in the order in which it was asked for.

    device: as locks name it, e.g. "cuda:0"; name: of the hardware; capability: the compute capability, e.g. "8.9".
    """

    device: str
    name: str
    capability: str

    def allocate(self, size: int) -> int:
        """The address of `size` bytes, all zero, for as long as the process lives."""
        ...

    def copy_in(self, address: int, array: Array) -> None:
        """Host to device; the array may change when this returns."""
        ...

    def copy_out(self, array: Array, address: int) -> None:
        """Device to host; the array is filled when this returns."""
        ...

    def copy(self, target: int, source: int, size: int) -> None:
        """Device to device, bytes that do not overlap."""
        ...

    def capture(self, work: Work) -> Work:
        """The same work as one launch. It must have run before."""
        ...

    def wait(self) -> None:
        """Until all that was asked for is done."""
        ...

    def load_onnx(self, graph: str, contents: Contents, weights: Contents | None) -> Program:
        """A graph on onnxruntime; weights: where they are kept beside it. Raises StudentError."""
        ...

    def load_plan(self, graph: str, plan: bytes, package: str) -> Program:
        """A TensorRT engine on `tensorrt` or `tensorrt_rtx`. Raises StudentError."""
        ...

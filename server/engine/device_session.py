"""A graph on a device: buffers allocated once, and one prepared launch for every batch and size that may come."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from server.engine.device_runtime import DeviceRuntime, DeviceTensor, Program, Work
from server.engine.session import Tensors, check_names
from server.engine.shapes import Shape
from server.engine.student import GraphName, GraphTensors

Shapes = dict[str, Shape]
STAYS = ("next_state",)  # of a video's decoder: gigabytes, of which the host wants nothing


@dataclass(frozen=True)
class Call:
    """A prepared launch, and the tensors that it reads and writes."""

    tensors: dict[str, DeviceTensor]
    launch: Work


class DeviceSession:
    """Implements session.Session: host arrays in, host arrays out. device_step.py uses its calls without those copies.

    An output in STAYS is put out as the tensor on the device, good until the next run, and may be an input of another session.

    Preparing means to run a graph once, so that the runtime settles what it leaves for the first time, and to capture what it
    does as one launch (a CUDA graph). All calls share the buffers, which are as large as the largest of them needs.
    """

    batch_invariant = False  # a GPU's kernels are chosen by shape

    def __init__(
        self, graph: GraphName, program: Program, runtime: DeviceRuntime, tensors: GraphTensors, cases: Sequence[Shapes]
    ) -> None:
        """cases: the shapes of all inputs, for everything that may come. Raises StudentError when the graph has other tensors
        than expected."""
        check_names(graph, "inputs", tensors.inputs, list(program.inputs))
        check_names(graph, "outputs", tensors.outputs, list(program.outputs))
        self.graph, self.program, self.runtime, self.tensors = graph, program, runtime, tensors
        self.specs = program.inputs | program.outputs
        inputs = self.placed(cases)
        outputs = self.placed([program.output_shapes(case) for case in inputs])
        self.calls = {
            case[tensors.inputs[0]].shape: self.prepare(case | out) for case, out in zip(inputs, outputs, strict=True)
        }

    def placed(self, cases: Sequence[Shapes]) -> list[dict[str, DeviceTensor]]:
        """Tensors of these shapes in buffers that they share, case by case."""
        types = {name: self.specs[name].dtype for name in cases[0]}
        sizes = {name: max(prod(case[name]) for case in cases) * dtype.itemsize for name, dtype in types.items()}
        buffers = {name: self.runtime.allocate(size) for name, size in sizes.items()}
        return [{name: DeviceTensor(buffers[name], shape, types[name]) for name, shape in case.items()} for case in cases]

    def prepare(self, tensors: dict[str, DeviceTensor]) -> Call:
        """A call that reads and writes these tensors."""
        work = self.program.bind(tensors)
        work()
        self.runtime.wait()
        return Call(tensors, self.runtime.capture(work) if self.program.capturable else work)

    def call(self, shape: Shape) -> Call:
        """The call whose first input has this shape. Raises ValueError for one that was not prepared."""
        if shape not in self.calls:
            first, legal = self.tensors.inputs[0], ", ".join(str(list(known)) for known in self.calls)
            raise ValueError(f"{self.graph}: {first} {list(shape)} is not among what was prepared: {legal}")
        return self.calls[shape]

    def run(self, tensors: Tensors) -> list[Any]:
        """See session.Session."""
        call = self.call(tensors[self.tensors.inputs[0]].shape)
        for name, given in tensors.items():
            if isinstance(given, DeviceTensor):
                self.runtime.copy(call.tensors[name].address, given.address, given.shape[0] * given.row_bytes)
            else:
                self.send(call.tensors[name].address, name, given)
        call.launch()
        outputs = {name: call.tensors[name] for name in self.tensors.outputs}
        return [tensor if name in STAYS else self.fetch(tensor) for name, tensor in outputs.items()]

    def send(self, address: int, name: str, array: npt.NDArray[Any]) -> None:
        """Host to device; what the array holds must be what the graph declares."""
        assert array.dtype == self.specs[name].dtype, f"{name} is {array.dtype}, the graph has {self.specs[name].dtype}"
        self.runtime.copy_in(address, np.ascontiguousarray(array))

    def fetch(self, tensor: DeviceTensor) -> npt.NDArray[Any]:
        """Device to host."""
        array = np.empty(tensor.shape, tensor.dtype)
        self.runtime.copy_out(array, tensor.address)
        return array

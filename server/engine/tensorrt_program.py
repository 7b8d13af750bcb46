"""A TensorRT engine, loaded by `tensorrt` or `tensorrt_rtx`, which have one interface. engine_plan.py says which may be."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np

from server.engine.device_runtime import DeviceTensor, TensorSpec, Work
from server.engine.engine_plan import Package
from server.engine.errors import EngineError, StudentError
from server.engine.shapes import Shape
from server.engine.tensorrt_log import log_of


def installed_packages() -> dict[Package, str]:
    """The TensorRT packages that can be imported here, with their versions."""
    found = [package for package in get_args(Package) if importlib.util.find_spec(package)]
    return {package: str(importlib.import_module(package).__version__) for package in found}


class TensorRTProgram:
    """Implements device_runtime.Program.

    Each call has an execution context of its own, since a captured launch holds its context to one shape. They share their
    scratch memory, which one stream makes safe.
    """

    capturable = True

    def __init__(self, graph: str, plan: bytes, package: str, stream: int, allocate: Callable[[int], int]) -> None:
        """Raises StudentError when TensorRT refuses the plan, with what it says."""
        self.trt: Any = importlib.import_module(package)
        self.graph, self.stream, self.log = graph, stream, log_of(self.trt)
        self.runtime = self.trt.Runtime(self.log)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise StudentError(f"{graph}: {package} refuses the engine: {self.log.said()}; build it again with fewstep engines")
        self.scratch_bytes = self.engine.device_memory_size_v2
        self.scratch = allocate(max(self.scratch_bytes, 1))
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        inputs = [name for name in names if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT]
        self.inputs = {name: self.spec(name) for name in inputs}
        self.outputs = {name: self.spec(name) for name in names if name not in inputs}
        self.asked = self.context()  # about shapes, and never run

    def spec(self, name: str) -> TensorSpec:
        """What the engine declares. Raises StudentError for a type that numpy does not have."""
        kind = self.engine.get_tensor_dtype(name)
        try:
            dtype = np.dtype(self.trt.nptype(kind))
        except TypeError:
            raise StudentError(
                f"{self.graph}: {name} is {kind.name}, which numpy lacks; keep a graph's edge in float32"
            ) from None
        return TensorSpec(dtype, tuple(self.engine.get_tensor_shape(name)))

    def output_shapes(self, inputs: Mapping[str, DeviceTensor]) -> dict[str, Shape]:
        """See device_runtime.Program; nothing is run."""
        self.shape_inputs(self.asked, inputs)
        return {name: tuple(self.asked.get_tensor_shape(name)) for name in self.outputs}

    def shape_inputs(self, context: Any, tensors: Mapping[str, DeviceTensor]) -> None:
        """Raises StudentError for a shape that the engine was not built for."""
        for name in self.inputs:
            if not context.set_input_shape(name, tensors[name].shape):
                raise StudentError(
                    f"{self.graph}: the engine takes no {name} of {list(tensors[name].shape)}: {self.log.said()}"
                )

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> Work:
        """See device_runtime.Program."""
        context = self.context()
        self.shape_inputs(context, tensors)
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.address)

        def work() -> None:
            if not context.execute_async_v3(self.stream):
                raise EngineError(f"{self.graph}: TensorRT could not run: {self.log.said()}")

        return work

    def context(self) -> Any:
        """An execution context on the shared scratch memory.

        TensorRT for RTX compiles kernels for the shapes it meets. It must do so before it answers: by default it goes on in
        the background, and changes kernels, and with them bits, under way. It must not capture graphs either: we do.
        """
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(self.trt, "DynamicShapesKernelSpecializationStrategy"):
            config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.DISABLED
        context = self.engine.create_execution_context(config)
        if context is None:
            raise StudentError(f"{self.graph}: TensorRT has no room to run the engine: {self.log.said()}")
        context.set_device_memory(self.scratch, max(self.scratch_bytes, 1))
        return context

"""The CUDA device that this process sees first, through NVIDIA's own bindings (package cuda-bindings, extra `gpu`)."""

from collections.abc import Callable
from typing import Any

import onnxruntime as ort

from server.engine.device_runtime import Array, Program, Work
from server.engine.errors import EngineError, StudentError
from server.engine.onnx_program import OnnxProgram
from server.engine.session import open_graph
from server.engine.student import Contents
from server.engine.tensorrt_program import TensorRTProgram

CUDA_PROVIDER = "CUDAExecutionProvider"
NO_BINDINGS = "a GPU is reached through the package cuda-bindings, which is not here; run `pip install 'fewstep[gpu]'`"
NO_GPU = "no NVIDIA GPU can be used here ({why}); without one, choose the provider cpu"
NO_PROVIDER = (
    "onnxruntime has no {provider} here, only {held}; run `pip uninstall onnxruntime` and `pip install onnxruntime-gpu`, or "
    "choose the provider tensorrt"
)


class CudaRuntime:
    """Implements device_runtime.DeviceRuntime on device 0; CUDA_VISIBLE_DEVICES says which GPU that is."""

    device = "cuda:0"

    def __init__(self) -> None:
        """Raises StudentError where there is no GPU, or nothing to reach it by."""
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise StudentError(NO_BINDINGS) from None
        self.cuda = runtime
        error, count = runtime.cudaGetDeviceCount()
        if error != runtime.cudaError_t.cudaSuccess or not count:
            raise StudentError(NO_GPU.format(why=error.name if error.value else "none is visible"))
        properties = self.asked(runtime.cudaGetDeviceProperties, 0)
        self.name, self.capability = properties.name.decode(), f"{properties.major}.{properties.minor}"
        self.stream = self.asked(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)

    def asked(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a CUDA function returns. Raises EngineError with the name of its error."""
        error, *values = function(*arguments)
        if error != self.cuda.cudaError_t.cudaSuccess:
            raise EngineError(f"{function.__name__}: {error.name}")
        return values[0] if values else None

    def allocate(self, size: int) -> int:
        address = int(self.asked(self.cuda.cudaMalloc, size))
        self.asked(self.cuda.cudaMemsetAsync, address, 0, size, self.stream)
        return address

    def copy_in(self, address: int, array: Array) -> None:
        """From memory that is not pinned CUDA has taken what it needs when this returns."""
        self.move(address, array.ctypes.data, array.nbytes, self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def copy_out(self, array: Array, address: int) -> None:
        self.move(array.ctypes.data, address, array.nbytes, self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self.wait()

    def copy(self, target: int, source: int, size: int) -> None:
        self.move(target, source, size, self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def move(self, target: int, source: int, size: int, kind: Any) -> None:
        self.asked(self.cuda.cudaMemcpyAsync, target, source, size, kind, self.stream)

    def capture(self, work: Work) -> Work:
        """The work as a CUDA graph."""
        self.asked(
            self.cuda.cudaStreamBeginCapture, self.stream, self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        work()
        graph = self.asked(self.cuda.cudaStreamEndCapture, self.stream)
        executable = self.asked(self.cuda.cudaGraphInstantiate, graph, 0)
        return lambda: self.asked(self.cuda.cudaGraphLaunch, executable, self.stream)

    def wait(self) -> None:
        self.asked(self.cuda.cudaStreamSynchronize, self.stream)

    def load_onnx(self, graph: str, contents: Contents, weights: Contents | None) -> Program:
        """On onnxruntime's CUDA provider and this runtime's stream; without tf32, so that float32 means float32."""
        held = ort.get_available_providers()
        if CUDA_PROVIDER not in held:
            raise StudentError(NO_PROVIDER.format(provider=CUDA_PROVIDER, held=", ".join(held)))
        options = {"device_id": "0", "user_compute_stream": str(int(self.stream)), "use_tf32": "0"}
        session = open_graph(graph, contents, weights, [(CUDA_PROVIDER, options)])
        if CUDA_PROVIDER not in session.get_providers():  # onnxruntime takes the processor instead, and goes on
            raise StudentError(
                f"{graph}.onnx: onnxruntime could not start {CUDA_PROVIDER}: are CUDA and cuDNN of its version here?"
            )
        return OnnxProgram(graph, session, "cuda")

    def load_plan(self, graph: str, plan: bytes, package: str) -> Program:
        return TensorRTProgram(graph, plan, package, int(self.stream), self.allocate)

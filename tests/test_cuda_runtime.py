"""The real device behind the seam. Without a GPU there is only its refusal to see; with one, copies and launches are real."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from server.engine.cuda_runtime import CudaRuntime
from server.engine.device_runtime import DeviceTensor, TensorSpec
from server.engine.device_session import DeviceSession
from server.engine.device_step import DeviceStep
from server.engine.errors import EngineError, StudentError
from server.engine.shapes import Shape
from server.engine.student import GraphTensors

FLOATS = np.dtype(np.float32)
LATENTS = (2, 3, 4)


def gpu() -> CudaRuntime | None:
    try:
        return CudaRuntime()
    except StudentError:
        return None


GPU = gpu()
on_gpu = pytest.mark.skipif(GPU is None, reason="no GPU is here")


@pytest.fixture
def runtime() -> CudaRuntime:
    assert GPU is not None
    return GPU


@pytest.mark.skipif(GPU is not None, reason="a GPU is here")
def test_without_a_gpu_it_says_so_and_what_to_choose() -> None:
    with pytest.raises(StudentError, match=r"no NVIDIA GPU can be used here \(\w+\); without one, choose the provider cpu"):
        CudaRuntime()


@on_gpu
def test_memory_begins_as_zeros_and_keeps_what_it_is_given(runtime: CudaRuntime) -> None:
    values, back = np.arange(1000, dtype=np.float32), np.ones(1000, np.float32)
    one, two = runtime.allocate(4000), runtime.allocate(4000)
    runtime.copy_out(back, one)
    assert not back.any()
    runtime.copy_in(one, values)
    runtime.copy(two, one, 4000)
    runtime.copy_out(back, two)
    assert np.array_equal(back, values)


@on_gpu
def test_a_captured_launch_does_the_same_again_on_what_is_there_by_then(runtime: CudaRuntime) -> None:
    one, two, back = runtime.allocate(4), runtime.allocate(4), np.zeros(1, np.float32)
    launch = runtime.capture(lambda: runtime.copy(two, one, 4))
    for value in (1.0, 2.0):
        runtime.copy_in(one, np.array([value], np.float32))
        launch()
        runtime.copy_out(back, two)
        assert back[0] == value


@on_gpu
def test_what_cuda_refuses_is_named(runtime: CudaRuntime) -> None:
    with pytest.raises(EngineError, match="cudaMalloc: cudaErrorMemoryAllocation"):
        runtime.allocate(1 << 60)


INPUTS = {
    "latents": TensorSpec(FLOATS, (-1, *LATENTS)),
    "x0_prev": TensorSpec(FLOATS, (-1, *LATENTS)),
    "timestep": TensorSpec(FLOATS, (-1,)),
    "text_emb": TensorSpec(FLOATS, (-1, 5)),
}
OUTPUTS = {name: TensorSpec(FLOATS, (-1, *LATENTS)) for name in ("next_latents", "x0")}


class Exchange:
    """A student whose NFE is two copies on the device: the next latents are the x0 before, x0 is the latents."""

    capturable = True

    def __init__(self, runtime: CudaRuntime) -> None:
        self.runtime, self.inputs, self.outputs = runtime, INPUTS, OUTPUTS

    def output_shapes(self, inputs: Mapping[str, DeviceTensor]) -> dict[str, Shape]:
        return {name: inputs["latents"].shape for name in self.outputs}

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> Callable[[], None]:
        def work() -> None:
            for target, source in (("next_latents", "x0_prev"), ("x0", "latents")):
                size = tensors[source].shape[0] * tensors[source].row_bytes
                self.runtime.copy(tensors[target].address, tensors[source].address, size)

        return work


@on_gpu
def test_rows_keep_their_latents_through_captured_nfes_in_changing_company(runtime: CudaRuntime) -> None:
    tensors = GraphTensors(tuple(INPUTS), tuple(OUTPUTS))
    cases = [{name: (rows, *spec.dims[1:]) for name, spec in INPUTS.items()} for rows in (1, 2, 3)]
    step = DeviceStep(DeviceSession("student_step", Exchange(runtime), runtime, tensors, cases))
    noise = [np.full((1, *LATENTS), number + 1, np.float32) for number in range(3)]
    places: list[Any] = [None] * 3

    def nfe(members: list[int], wanted: bool) -> list[float]:
        rows = {
            "latents": [noise[member] for member in members],
            "x0_prev": [-noise[member] for member in members],
            "timestep": [np.zeros(1, np.float32) for _ in members],
            "text_emb": [np.zeros((1, 5), np.float32) for _ in members],
        }
        stepped = step.step(rows, [places[member] for member in members], [wanted] * len(members), len(members))
        for member, one in zip(members, stepped, strict=True):
            places[member] = one.place
        return [float(one.host[0].mean()) for one in stepped if one.host]

    assert nfe([0, 1, 2], wanted=False) == []
    assert nfe([2, 0], wanted=True) == [3.0, 1.0]  # exchanged twice: the noise again
    assert nfe([1], wanted=True) == [2.0]
    assert nfe([2, 1, 0], wanted=True) == [-3.0, -2.0, -1.0]

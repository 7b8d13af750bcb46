"""Students on a device: latents stay there between NFEs, memory is asked for once, and the pixels are those of the processor.

The device is FakeRuntime: numpy's memory, onnxruntime's arithmetic.
"""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engine.device import FreeDevice
from server.engine.device_step import DeviceStep
from server.engine.engine import Determinism, Engine
from server.engine.errors import NumericalError
from server.engine.request import Progress, Request
from server.engine.scheduler import Scheduler
from server.engine.student import ExportedStudent, open_student
from tests.fakes import FakeRuntime, Recorder
from tests.tiny_student import build_tiny_student

CONTROL_BYTES = 12  # of one row: coefficients, the largest of what every NFE is told


@pytest.fixture(scope="module")
def student(tiny_repository: Path) -> ExportedStudent:
    """The tiny student under a solver that looks back at the x0 before, so that an x0 that is lost changes the pixels."""
    student = open_student(tiny_repository / "tiny")
    tables = {nfe: [(*row[:3], 0.25 * step) for step, row in enumerate(rows)] for nfe, rows in student.manifest.tables.items()}
    return replace(student, manifest=student.manifest.model_copy(update={"tables": tables}))


def opened(student: ExportedStudent, determinism: Determinism = "fast", max_batch: int = 4) -> tuple[Engine, FakeRuntime]:
    """The student on onnxruntime's I/O binding, on a device of its own."""
    runtime = FakeRuntime()
    manifest = student.manifest.model_copy(update={"max_batch": max_batch})
    return Engine.of(replace(student, manifest=manifest), determinism, "cuda", runtime), runtime


def request(seed: int = 7, **changes: Any) -> Request:
    return Request(**{"prompt": "a red circle", "seed": seed, "image_index": 0, "nfe": 4, "size": "64x64"} | changes)


def finish(engine: Engine, batch: list[Progress]) -> list[np.ndarray]:
    """Runs a batch to its end, NFE by NFE, and returns each member's last latents."""
    while running := [member for member in batch if member.remaining]:
        assert engine.step(running) == [None] * len(running)
    return [member.latents for member in batch]


@pytest.mark.parametrize("determinism", ["strict", "fast"])
def test_the_pixels_are_those_of_the_processor_bit_for_bit(student: ExportedStudent, determinism: Determinism) -> None:
    engine, _ = opened(student, determinism)
    here = Engine.of(student)
    for seed, nfe, size in ((1, 1, "64x64"), (2, 3, "64x32"), (3, 4, "64x64")):
        asked = request(seed, nfe=nfe, size=size)
        assert np.array_equal(engine.run(asked).image, here.run(asked).image)


def test_rows_are_independent_of_their_mates_whatever_their_steps(student: ExportedStudent) -> None:
    engine, _ = opened(student)
    here = Engine.of(student)
    batch = [engine.prepare(request(seed, nfe=nfe)) for seed, nfe in ((1, 4), (2, 2), (3, 3), (4, 1))]
    engine.step(batch[:2])  # so that the others join later, at other steps
    engine.step(batch[1:3])
    for member, latents in zip(batch, finish(engine, batch), strict=True):
        alone = here.prepare(member.request)
        assert np.array_equal(latents, finish(here, [alone])[0])


def test_between_two_nfes_only_the_line_of_the_table_goes_over_the_bus(student: ExportedStudent) -> None:
    engine, runtime = opened(student)
    batch = [engine.prepare(request(seed)) for seed in (1, 2, 3)]
    engine.step(batch)
    before = len(runtime.bus)
    with runtime.at_most(CONTROL_BYTES * len(batch)):
        engine.step(batch)
        engine.step(batch)
    assert {way for way, _ in runtime.bus[before:]} == {"in"}
    assert sum(size for _, size in runtime.bus[before:]) == 2 * len(batch) * (4 + 12 + 8)
    engine.step(batch)
    latents = batch[0].latents.nbytes
    assert [copy for copy in runtime.bus[before:] if copy[0] == "out"] == [("out", latents)] * 2 * len(batch)


def test_a_preview_comes_to_the_host_and_its_request_stays_on_the_device(student: ExportedStudent) -> None:
    engine, runtime = opened(student)
    here = Engine.of(student).prepare(request())
    shown = engine.prepare(request(previews=(2,)))
    for _ in range(2):
        engine.step([shown])
        Engine.of(student).step([here])
    assert np.array_equal(shown.x0, here.x0)
    with runtime.at_most(CONTROL_BYTES):
        engine.step([shown])


def test_all_memory_is_asked_for_and_every_launch_captured_before_the_first_request(student: ExportedStudent) -> None:
    runtime = FakeRuntime()
    engine = engine_on_plans(student, runtime, "fast")
    captured = len(student.manifest.sizes) * (student.manifest.max_batch + 4) + 1  # NFEs, decodes and a prompt
    assert runtime.captured == captured
    finish(engine, [engine.prepare(request(seed)) for seed in range(engine.max_batch)])
    assert runtime.launches
    assert runtime.captured == captured


def test_strict_prepares_one_launch_for_each_size_and_runs_no_other(student: ExportedStudent) -> None:
    runtime = FakeRuntime()
    engine = engine_on_plans(student, runtime, "strict")
    assert runtime.captured == 2 * len(student.manifest.sizes) + 1
    finish(engine, [engine.prepare(request(seed)) for seed in range(3)])
    session = engine.sessions["student_step"]
    assert isinstance(session, DeviceStep)
    assert {shape[0] for shape in session.session.calls} == {student.manifest.max_batch}


def engine_on_plans(student: ExportedStudent, runtime: FakeRuntime, determinism: Determinism) -> Engine:
    """As provider.on_tensorrt does it, with graphs in the place of plans."""
    graphs = FakeRuntime.load_plan
    runtime.load_onnx = lambda graph, contents, weights: graphs(runtime, graph, contents, "tensorrt")  # type: ignore[method-assign]
    return Engine.of(student, determinism, "cuda", runtime)


def test_a_batch_that_was_not_prepared_is_refused_with_what_was(student: ExportedStudent) -> None:
    engine, _ = opened(student)
    tensors = {"latents": np.zeros((5, 4, 8, 8), np.float32)}
    with pytest.raises(ValueError, match=r"vae_decoder: latents \[5, 4, 8, 8\] is not among.*\[4, 4, 8, 8\]"):
        engine.sessions["vae_decoder"].run(tensors)


def test_requests_beyond_the_places_go_on_by_way_of_the_host(student: ExportedStudent) -> None:
    engine, _ = opened(student, max_batch=2)
    here = Engine.of(student)
    waiting = [engine.prepare(request(seed)) for seed in range(7)]  # 4 places
    for member in waiting:
        engine.step([member])
    assert [member.place is not None for member in waiting] == [True] * 4 + [False] * 3
    for member in waiting:
        assert np.array_equal(finish(engine, [member])[0], finish(here, [here.prepare(member.request)])[0])


@pytest.mark.parametrize("ending", ["finished", "cancelled", "failed"])
def test_however_a_request_ends_its_place_is_free_again(student: ExportedStudent, ending: str) -> None:
    engine, _ = opened(student)
    session = engine.sessions["student_step"]
    assert isinstance(session, DeviceStep)
    everything = sorted(session.free)
    scheduler, sink = Scheduler(engine, FreeDevice()), Recorder()
    scheduler.submit(request(), sink)
    scheduler.tick()
    assert len(session.free) == len(everything) - 1
    sink.wanted = ending != "cancelled"
    if ending == "failed":
        decoder = engine.sessions["vae_decoder"]
        decoder.run = lambda tensors: 1 / 0  # type: ignore[method-assign,assignment]
    while scheduler.members:
        scheduler.tick()
    del scheduler
    gc.collect()
    assert sink.answers
    assert sorted(session.free) == everything


def test_a_launch_that_fails_leaves_latents_and_places_as_they_were(student: ExportedStudent) -> None:
    runtime = FakeRuntime()
    engine = engine_on_plans(student, runtime, "fast")
    member = engine.prepare(request())
    engine.step([member])
    runtime.on_launch = [RuntimeError("the device was busy")]
    with pytest.raises(RuntimeError):
        engine.step([member])
    here = Engine.of(student)
    assert np.array_equal(finish(engine, [member])[0], finish(here, [here.prepare(member.request)])[0])


def test_what_is_not_finite_makes_no_image_and_harms_no_mate(tmp_path: Path) -> None:
    student = open_student(build_tiny_student(tmp_path, poisoned=True))
    engine, _ = opened(student)
    poisoned, mate = engine.prepare(request(nfe=2)), engine.prepare(request(nfe=3))
    engine.step([poisoned, mate])
    errors = engine.step([poisoned, mate])
    assert isinstance(errors[0], NumericalError)
    here = Engine.of(student)
    assert np.array_equal(finish(engine, [mate])[0], finish(here, [here.prepare(mate.request)])[0])
    with pytest.raises(NumericalError):
        engine.run(request(nfe=2))


def test_the_fingerprint_tells_the_device_and_what_runs_there(student: ExportedStudent) -> None:
    engine, _ = opened(student)
    assert engine.device == "cuda:0"
    assert engine.fingerprint_parts["provider"] == "CUDAExecutionProvider"
    assert engine.fingerprint_parts["device"] == "Fake, compute capability 8.9"
    assert engine.fingerprint != Engine.of(student).fingerprint

"""The real Triton: the same pixels as in process, and alive again after whatever kills it."""

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from server.engine.engine import Engine
from server.engine.request import Request
from server.gateway import triton_backend
from server.gateway.backend import (
    BackendFailed,
    BackendUnavailable,
    DeadlineExceeded,
    Generated,
    GenerationRequest,
    InvalidRequest,
    NumericalError,
)
from server.gateway.triton_backend import TritonBackend
from tests.conftest import Server, alive, start_server
from tests.tiny_student import build_tiny_student

CROWD = 96

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the Triton wheel exists for Linux alone")

BODY = {"prompt": "a red circle above a blue square", "seed": 7}


def pixel_hash(url: str, **changes: Any) -> str:
    """x-pixel-sha256 of one picture from a running server."""
    answer = httpx.post(
        f"{url}/v1/images/generations", json=BODY | changes, headers={"accept": "image/png"}, timeout=60
    ).raise_for_status()
    return answer.headers["x-pixel-sha256"]


def engine_hash(engine: Engine, **changes: Any) -> str:
    """sha256 of the same picture made here, without a server."""
    asked = BODY | {"image_index": 0, "num_inference_steps": engine.manifest.default_nfe} | changes
    size = next(iter(engine.manifest.sizes))
    request = Request(asked["prompt"], asked["seed"], asked["image_index"], asked["num_inference_steps"], size)
    return hashlib.sha256(engine.run(request).image.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def engine(bundled_repository: Path) -> Engine:
    return Engine.open(bundled_repository / "scenes")


@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
def test_triton_equals_in_process_bit_for_bit(triton_server: Server, engine: Engine, nfe: int) -> None:
    for seed in (0, 7, 2**64 - 1):
        changes = {"seed": seed, "num_inference_steps": nfe, "image_index": nfe}
        assert pixel_hash(triton_server.url, **changes) == engine_hash(engine, **changes)


def test_eight_at_once_equal_each_one_alone(triton_server: Server, engine: Engine) -> None:
    requests = [{"seed": seed % 4, "num_inference_steps": 1 + seed % 4} for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda changes: pixel_hash(triton_server.url, **changes), requests))
    assert together == [engine_hash(engine, **changes) for changes in requests]


def test_triton_and_in_process_have_one_fingerprint(triton_server: Server, engine: Engine) -> None:
    model = httpx.get(f"{triton_server.url}/v1/models/scenes").json()
    assert model["fingerprint"] == engine.fingerprint


def test_the_running_server_says_that_it_is_ready(triton_server: Server) -> None:
    assert httpx.get(f"{triton_server.url}/readyz", timeout=30).json() == {"status": "ready"}


def test_a_prompt_of_too_many_tokens_is_a_400_through_triton(triton_server: Server) -> None:
    answer = httpx.post(f"{triton_server.url}/v1/images/generations", json={"prompt": "a " * 100}, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


def test_a_restart_changes_no_pixel_and_leaves_no_process(bundled_repository: Path, engine: Engine) -> None:
    server = start_server(bundled_repository)
    children = server.children()
    assert len(children) >= 2
    assert pixel_hash(server.url) == engine_hash(engine)
    assert server.stop(signal.SIGINT) == 0
    assert not any(alive(pid) for pid in children)


def test_a_killed_gateway_takes_triton_with_it(tiny_repository: Path) -> None:
    server = start_server(tiny_repository)
    children = server.children()
    server.stop(signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in children), 10)


def test_the_in_process_backend_gives_the_same_picture_over_http(bundled_repository: Path, engine: Engine) -> None:
    server = start_server(bundled_repository, "inprocess")
    assert pixel_hash(server.url) == engine_hash(engine)
    assert server.stop() == 0


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


@contextlib.asynccontextmanager
async def running(repository: Path) -> AsyncIterator[TritonBackend]:
    backend = TritonBackend(repository)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.stop()


def tiny_request(**changes: Any) -> GenerationRequest:
    values = {"student": "tiny", "prompt": "a", "seed": 1, "image_index": 0, "nfe": 4, "size": "64x64"}
    return GenerationRequest(**values | changes)  # type: ignore[arg-type]


def stub_of(backend: TritonBackend) -> int:
    """Process id of the first Python stub."""
    assert backend.server is not None
    pid = backend.server.process.pid
    return int(
        next(text for task in Path(f"/proc/{pid}/task").iterdir() if (text := (task / "children").read_text())).split()[0]
    )


async def healed(backend: TritonBackend, seconds: float) -> Generated:
    """The first image after a fault; anything but an image or BackendUnavailable is a failure."""
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(BackendUnavailable):
                return await backend.generate(tiny_request())
            await asyncio.sleep(0.1)


async def survive(backend: TritonBackend, pid: int) -> None:
    """Kills `pid` while 40 requests are under way: each ends with the right image or as unavailable, and all is well soon."""
    right = (await backend.generate(tiny_request())).image.tobytes()
    under_way = [asyncio.create_task(backend.generate(tiny_request())) for _ in range(40)]
    await asyncio.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        outcomes = await asyncio.gather(*under_way, return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, BackendUnavailable) or outcome.image.tobytes() == right  # type: ignore[union-attr]
    assert (await healed(backend, 30)).image.tobytes() == right
    assert await backend.ready()


def test_triton_does_not_take_the_core_of_the_gateway_that_wakes_it(tiny_repository: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_repository) as backend:
            for process in backend.processes():
                policies = set()
                for thread in os.listdir(f"/proc/{process}/task"):
                    with contextlib.suppress(ProcessLookupError):  # a thread may end at any time
                        policies.add(os.sched_getscheduler(int(thread)))
                assert policies == {os.SCHED_BATCH}

    asyncio.run(scenario())


def test_triton_killed_in_mid_request_is_unavailable_then_healthy(tiny_repository: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_repository) as backend:
            assert backend.server is not None
            await survive(backend, backend.server.process.pid)

    asyncio.run(scenario())


def test_a_killed_python_stub_is_unavailable_then_healthy(tiny_repository: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_repository) as backend:
            await survive(backend, stub_of(backend))

    asyncio.run(scenario())


def test_a_stub_that_dies_in_silence_is_not_ready_and_is_replaced_unasked(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "QUIET_SECONDS", 0.5)

    async def scenario() -> None:
        async with running(tiny_repository) as backend:
            os.kill(first := stub_of(backend), signal.SIGKILL)
            assert not await backend.ready()
            async with asyncio.timeout(30):
                while not await backend.ready():
                    await asyncio.sleep(0.1)
            assert stub_of(backend) != first

    asyncio.run(scenario())


def test_a_frozen_triton_is_replaced(tiny_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "QUIET_SECONDS", 0.5)
    monkeypatch.setattr(triton_backend, "PROBE_SECONDS", 1.0)

    async def scenario() -> None:
        async with running(tiny_repository) as backend:
            assert backend.server is not None
            os.kill(backend.server.process.pid, signal.SIGSTOP)
            await healed(backend, 30)

    asyncio.run(scenario())


def test_typed_errors_cross_triton(tmp_path: Path) -> None:
    build_tiny_student(tmp_path)
    build_tiny_student(tmp_path, "poisoned", poisoned=True)

    async def scenario() -> None:
        async with running(tmp_path) as backend:
            assert set(backend.students) == {"tiny", "poisoned"}
            with pytest.raises(InvalidRequest) as caught:
                await backend.generate(tiny_request(nfe=9))
            assert caught.value.param == "nfe"
            with pytest.raises(NumericalError):
                await backend.generate(tiny_request(student="poisoned", nfe=2))
            assert (await backend.generate(tiny_request(student="poisoned", nfe=1))).image.shape == (64, 64, 3)

    asyncio.run(scenario())


def test_triton_listens_on_loopback_and_refuses_what_reaches_its_inside(tiny_repository: Path) -> None:
    async def scenario() -> None:
        async with running(tiny_repository) as backend:
            assert backend.server is not None
            await asyncio.to_thread(attempt_inside, backend.server.port)

    asyncio.run(scenario())


def attempt_inside(port: int) -> None:
    with InferenceServerClient(f"127.0.0.1:{port}") as client:
        attempts: list[Callable[[], Any]] = [
            lambda: client.unload_model("tiny"),
            lambda: client.load_model("tiny"),
            lambda: client.get_system_shared_memory_status(),
            lambda: client.get_log_settings(),
            lambda: client.get_trace_settings(),
        ]
        for attempt in attempts:
            with pytest.raises(InferenceServerException, match="restricted"):
                attempt()


@pytest.mark.parametrize("name", ["1/student_step.onnx", "1/student.json", "1/model.py", "config.pbtxt"])
def test_a_spoiled_repository_is_one_line_and_no_process(own_repository: Path, name: str) -> None:
    path = own_repository / "tiny" / name
    path.unlink()
    backend = TritonBackend(own_repository)
    with pytest.raises(BackendFailed, match=r"is missing") as caught:
        asyncio.run(backend.start())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert backend.server is None


def test_a_config_of_another_student_is_refused_by_triton(own_repository: Path) -> None:
    path = own_repository / "tiny" / "config.pbtxt"
    path.write_text(
        path.read_text().replace('manifest_sha256" value: { string_value: "', 'manifest_sha256" value: { string_value: "0')
    )

    async def scenario() -> None:
        backend = TritonBackend(own_repository)
        with pytest.raises(BackendFailed, match="do not belong together"):
            await backend.start()
        assert backend.server is None

    asyncio.run(scenario())


def metrics(backend: TritonBackend) -> dict[str, float]:
    """Counters of Triton's metrics endpoint, added up over their labels."""
    assert backend.server is not None
    found: dict[str, float] = {}
    for line in httpx.get(f"http://127.0.0.1:{backend.server.metrics_port}/metrics").text.splitlines():
        if line.startswith("fewstep_"):
            name = line.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


async def settled(backend: TritonBackend) -> dict[str, float]:
    """The counters once they have stood still for longer than they take to be passed on."""
    before = {"nothing yet": 0.0}
    while (now := await asyncio.to_thread(metrics, backend)) != before:
        before = now
        await asyncio.sleep(0.6)
    return now


def bundled_request(seed: int, **changes: Any) -> GenerationRequest:
    values = {"student": "scenes", "prompt": "a red circle", "seed": seed, "image_index": 0, "nfe": 4, "size": "128x128"}
    return GenerationRequest(**values | changes)  # type: ignore[arg-type]


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for images of their own while counters are compared."""
    monkeypatch.setattr(triton_backend, "QUIET_SECONDS", 1000.0)


@pytest.mark.usefixtures("no_probes")
def test_a_closed_stream_stops_the_work_and_harms_no_mate(bundled_repository: Path, engine: Engine) -> None:
    async def scenario() -> None:
        async with running(bundled_repository) as backend:
            before = await settled(backend)
            # So many that most still wait when word of those who leave arrives, on a busy machine too.
            tasks = [asyncio.create_task(backend.generate(bundled_request(seed))) for seed in range(CROWD)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # by then Triton has heard of most
            for task in tasks[::2]:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            after = await settled(backend)
            kept = [outcome for outcome in outcomes if isinstance(outcome, Generated)]
            assert CROWD // 2 <= len(kept) < CROWD
            assert all(isinstance(outcome, Generated) for outcome in outcomes[1::2])
            for seed, outcome in enumerate(outcomes):
                if isinstance(outcome, Generated):
                    assert np.array_equal(outcome.image, engine.run(Request("a red circle", seed, 0, 4, "128x128")).image)
            gained = {name: after[name] - before.get(name, 0.0) for name in after}
            heard = gained["fewstep_finished_total"]
            assert len(kept) <= heard <= CROWD, "who leaves before Triton has heard of it is none of its requests"
            assert 0 < gained["fewstep_cancelled_total"] <= heard - len(kept), (
                "a few may have been done when they were cancelled"
            )
            assert gained["fewstep_steps_requested_total"] == heard * 4
            assert len(kept) * 4 <= gained["fewstep_steps_executed_total"] < CROWD * 4
            assert after["fewstep_in_flight"] == after["fewstep_queue_depth"] == 0

    asyncio.run(scenario())


@pytest.mark.usefixtures("no_probes")
def test_a_passed_deadline_is_typed_and_executes_no_more(bundled_repository: Path) -> None:
    async def scenario() -> None:
        async with running(bundled_repository) as backend:
            before = await settled(backend)
            crowd = [backend.generate(bundled_request(seed, timeout_ms=1)) for seed in range(8)]
            outcomes = await asyncio.gather(*crowd, return_exceptions=True)
            assert all(isinstance(outcome, DeadlineExceeded) for outcome in outcomes)
            after = await settled(backend)
            assert after["fewstep_steps_executed_total"] - before["fewstep_steps_executed_total"] <= 8
            assert after["fewstep_finished_total"] - before.get("fewstep_finished_total", 0.0) == 8

    asyncio.run(scenario())


def test_previews_come_in_order_before_the_same_image(bundled_repository: Path, engine: Engine) -> None:
    async def scenario() -> None:
        async with running(bundled_repository) as backend:
            seen: list[tuple[int, np.ndarray]] = []
            made = await backend.generate(
                bundled_request(7, previews=(1, 2, 3)), lambda step, image: seen.append((step, image))
            )
            plain = await backend.generate(bundled_request(7))
            assert np.array_equal(made.image, plain.image)
            assert [step for step, _ in seen] == [1, 2, 3]
            distances = [np.abs(image.astype(int) - made.image).mean() for _, image in seen]
            assert distances[0] > distances[2] > 0, "previews are real and draw near"
            assert "preview" not in {span.stage for span in plain.spans}

    asyncio.run(scenario())


def test_one_nfe_requests_do_not_wait_for_the_longer_ones_before_them(bundled_repository: Path) -> None:
    async def scenario() -> None:
        async with running(bundled_repository) as backend:
            order: list[str] = []

            async def ask(seed: int, nfe: int) -> None:
                await backend.generate(bundled_request(seed, nfe=nfe))
                order.append(f"{nfe}")

            await asyncio.gather(*(ask(seed, 4) for seed in range(12)), ask(100, 1))
            assert order.index("1") < 6, "the last to come was among the first to leave"

    asyncio.run(scenario())


def test_a_key_that_floods_is_no_queue_for_another_key(bundled_repository: Path) -> None:
    async def scenario() -> None:
        async with running(bundled_repository) as backend:
            order: list[str] = []

            async def ask(seed: int, who: str) -> None:
                await backend.generate(bundled_request(seed, who=who))
                order.append(who)

            await asyncio.gather(*(ask(seed, "flood") for seed in range(64)), *(ask(seed, "other") for seed in range(100, 104)))
            assert max(index for index, who in enumerate(order) if who == "other") < 40, "the last to come did not leave last"

    asyncio.run(scenario())

"""What /metrics shows: exact counts of every outcome, the same families from both backends, two formats that parsers accept."""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from server.engine.exposition import exposition
from server.engine.metrics import METRICS, MemoryMetrics
from server.gateway.app import create_app
from server.gateway.backend import BackendFault, BackendTimeout, BackendUnavailable
from server.gateway.errors import ApiError
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.serve import listen
from server.gateway.settings import Settings
from tests.conftest import Server

PATH = "/v1/images/generations"
BODY = {"prompt": "a red circle", "seed": 7}
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


@pytest.fixture(scope="module")
def app(tiny_backend: InProcessBackend) -> FastAPI:
    return create_app(tiny_backend, Settings())


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """Every sample of Prometheus text by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def read(client: Any) -> Samples:
    return samples(client.get("/metrics").text)


def gained(before: Samples, after: Samples, name: str) -> dict[tuple[str, ...], float]:
    """By label values in the order of the labels' names: how much each series of `name` rose."""
    rises = {
        tuple(value for _, value in labels): value - before.get((known, labels), 0.0)
        for (known, labels), value in after.items()
        if known == name
    }
    return {labels: rise for labels, rise in rises.items() if rise}


@pytest.mark.parametrize(
    ("body", "model", "nfe", "status"),
    [
        (BODY, "tiny", "4", "200"),
        (BODY | {"num_inference_steps": 2, "n": 3, "model": "tiny"}, "tiny", "2", "200"),
        (BODY | {"num_inference_steps": 10**9, "model": "tiny"}, "tiny", "", "400"),
        (BODY | {"prompt": "a " * 20}, "tiny", "4", "400"),
        ([], "unknown", "", "400"),
        (BODY | {"model": 'gpt"\n# HELP'}, "unknown", "", "404"),
        (BODY | {"prompt": "a" * Settings().max_body_bytes}, "unknown", "", "413"),
    ],
)
def test_one_request_is_one_count(client: TestClient, body: Any, model: str, nfe: str, status: str) -> None:
    before = read(client)
    assert client.post(PATH, json=body).status_code == int(status)
    after = read(client)
    assert gained(before, after, "fewstep_requests_total") == {(model, nfe, status): 1}
    timed = {(model, nfe): 1} if status == "200" else {}
    assert gained(before, after, "fewstep_request_duration_seconds_count") == timed
    assert gained(before, after, "fewstep_rejected_total") == {}


def test_what_asks_for_no_image_is_not_counted(client: TestClient) -> None:
    before = read(client)
    for path in ("/livez", "/readyz", "/v1/models", "/nothing", PATH, "/metrics", "/docs"):
        client.get(path)
    assert read(client) == before


class FailingBackend:
    """Every image and every scrape fails."""

    def __init__(self, students: Any, error: Exception) -> None:
        self.students, self.error = students, error

    async def ready(self) -> bool:
        return False

    async def generate(self, request: Any, on_preview: Any = None) -> Any:
        raise self.error

    async def scrape(self) -> str:
        raise BackendUnavailable("down")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (BackendUnavailable("gone"), "503", "backend_unavailable"),
        (ApiError(429, "too many", code="rate_limited"), "429", "rate_limited"),
        (BackendTimeout("slow"), "504", None),
        (BackendFault("bad"), "500", None),
        (RuntimeError("worse"), "500", None),
        (ApiError(499, "the caller went away", code="cancelled"), "cancelled", None),
    ],
)
def test_every_failure_is_one_count_and_every_reject_one_more(
    app: FastAPI, error: Exception, status: str, reason: str | None
) -> None:
    failing = create_app(FailingBackend(app.state.backend.students, error), Settings())  # type: ignore[arg-type]
    with TestClient(failing) as client:
        client.post(PATH, json=BODY | {"n": 2})
        found = read(client)
    assert gained({}, found, "fewstep_requests_total") == {("tiny", "4", status): 1}
    assert gained({}, found, "fewstep_rejected_total") == ({(reason,): 1} if reason else {})
    assert gained({}, found, "fewstep_request_duration_seconds_count") == {}


def test_a_backend_that_is_down_takes_only_its_own_metrics_away(app: FastAPI) -> None:
    down = create_app(FailingBackend(app.state.backend.students, BackendUnavailable("gone")), Settings())  # type: ignore[arg-type]
    with TestClient(down) as client:
        client.post(PATH, json=BODY)
        found = read(client)
    assert found["fewstep_backend_up", ()] == 0
    assert not any(name.startswith("fewstep_steps") for name, _ in found)
    assert any(name == "fewstep_requests_total" for name, _ in found)


def test_two_applications_count_apart(app: FastAPI) -> None:
    with TestClient(create_app(app.state.backend, Settings())) as fresh:
        assert gained({}, read(fresh), "fewstep_requests_total") == {}


async def requested(app: FastAPI, *messages: dict[str, Any]) -> None:
    """One request at the level of ASGI, whose caller sends `messages` and then closes the connection."""
    waiting = [*messages, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [(b"content-type", b"application/json")]}
    await app(scope | {"query_string": b"", "http_version": "1.1", "scheme": "http", "server": None}, receive, send)


def test_a_caller_who_leaves_in_the_middle_of_the_body_is_cancelled_and_no_failure(app: FastAPI) -> None:
    fresh = create_app(app.state.backend, Settings())
    asyncio.run(requested(fresh, {"type": "http.request", "body": b'{"prompt"', "more_body": True}))
    with TestClient(fresh) as client:
        assert gained({}, read(client), "fewstep_requests_total") == {("unknown", "", "cancelled"): 1}


class HalfBackend:
    """Shows a preview and then fails, or never ends."""

    def __init__(self, real: InProcessBackend, error: Exception | None = None) -> None:
        self.students, self.error, self.scrape = real.students, error, real.scrape

    async def generate(self, request: Any, on_preview: Any = None) -> Any:
        for step in request.previews:
            on_preview(step, np.zeros((64, 64, 3), np.uint8))
        await asyncio.sleep(0.05 if self.error else 60)
        raise self.error or AssertionError


def test_a_stream_that_fails_after_its_first_event_is_a_failure(app: FastAPI) -> None:
    half = create_app(HalfBackend(app.state.backend, BackendFault("bad")), Settings())  # type: ignore[arg-type]
    with TestClient(half) as client:
        answer = client.post(PATH, json=BODY | {"stream": True, "partial_images": 1})
        assert (answer.status_code, "event: error" in answer.text) == (200, True)
        assert gained({}, read(client), "fewstep_requests_total") == {("tiny", "4", "500"): 1}


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[httpx.Client]:
    """`app` behind a real socket."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),))
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
                yield client
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


@pytest.mark.parametrize("changes", [{}, {"n": 3}, {"stream": True}, {"stream": True, "partial_images": 1}])
def test_a_closed_socket_is_one_cancellation_and_no_failure(app: FastAPI, changes: dict[str, Any]) -> None:
    with listening(create_app(HalfBackend(app.state.backend), Settings())) as client:  # type: ignore[arg-type]
        with contextlib.suppress(httpx.ReadTimeout):
            client.post(PATH, json=BODY | changes, timeout=0.5)
        end = time.monotonic() + 5
        while not (counted := gained({}, read(client), "fewstep_requests_total")) and time.monotonic() < end:
            time.sleep(0.05)
        assert counted == {("tiny", "4", "cancelled"): 1}


def test_the_engine_says_what_it_is(client: TestClient) -> None:
    ((labels, value),) = ((labels, value) for (name, labels), value in read(client).items() if name == "fewstep_engine_info")
    assert value == 1
    said = dict(labels)
    assert set(said) == {"model", "provider", "precision", "fingerprint"}
    assert said["provider"] == "CPUExecutionProvider"
    assert said["fingerprint"] == client.get("/v1/models/tiny").json()["fingerprint"]


def test_both_formats_are_what_their_parsers_accept_and_say_the_same(client: TestClient) -> None:
    client.post(PATH, json=BODY)
    plain, strict = client.get("/metrics"), client.get("/metrics", headers={"accept": OPENMETRICS})
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert strict.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = list(parse_openmetrics(strict.text))
    assert {sample.name for family in families for sample in family.samples} == {name for name, _ in samples(plain.text)}


def test_histograms_begin_at_a_millisecond_and_their_buckets_add_up(client: TestClient) -> None:
    client.post(PATH, json=BODY)
    for family in parse_text(client.get("/metrics").text):
        if family.type != "histogram":
            continue
        series: dict[Any, list[float]] = {}
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                others = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
                series.setdefault(others, []).append(sample.value)
        counts = {tuple(sorted(s.labels.items())): s.value for s in family.samples if s.name.endswith("_count")}
        assert {labels: values[-1] for labels, values in series.items()} == counts
        assert all(values == sorted(values) for values in series.values())
        if family.name.endswith("_seconds"):
            assert min(float(s.labels["le"]) for s in family.samples if "le" in s.labels) == 0.001


def test_probes_of_our_own_are_counted_nowhere(app: FastAPI) -> None:
    backend: InProcessBackend = app.state.backend
    before = samples(asyncio.run(backend.scrape()))
    asyncio.run(backend.generate(backend.students["tiny"].warm_up()))
    assert samples(asyncio.run(backend.scrape())) == before


def test_a_value_in_memory_is_shown_in_its_bucket() -> None:
    metrics = MemoryMetrics()
    for value in (0.0005, 0.001, 0.0011, 99.0):
        metrics.observe("fewstep_queue_wait_seconds", value)
    found = samples(exposition({"a": metrics, "b": MemoryMetrics()}))
    buckets = {dict(labels)["le"]: value for (name, labels), value in found.items() if name.endswith("_bucket")}
    assert (buckets["0.001"], buckets["0.002"], buckets["32.0"], buckets["+Inf"]) == (2, 3, 3, 4)
    assert found["fewstep_queue_wait_seconds_sum", (("model", "a"),)] == pytest.approx(99.0026)


@pytest.mark.skipif(sys.platform != "linux", reason="the Triton wheel exists for Linux alone")
def test_triton_shows_the_families_of_the_in_process_backend_and_its_own(client: TestClient, triton_server: Server) -> None:
    client.post(PATH, json=BODY)
    with httpx.Client(base_url=triton_server.url, timeout=60) as real:
        before = read(real)
        assert real.post(PATH, json=BODY | {"num_inference_steps": 3}).status_code == 200
        real.get("/readyz")
        time.sleep(0.6)  # numbers cross from the model's process four times a second
        after = read(real)
        strict = list(parse_openmetrics(real.get("/metrics", headers={"accept": OPENMETRICS}).text))
    assert gained(before, after, "fewstep_requests_total") == {("scenes", "3", "200"): 1}
    assert gained(before, after, "fewstep_steps_executed_total") == {("scenes",): 3}
    assert gained(before, after, "fewstep_finished_total") == {("scenes", "3", "completed"): 1}
    ours = {name for name, _ in read(client) if name.startswith("fewstep_")}
    assert ours <= {name for name, _ in after}
    assert ("nv_inference_request_success", (("model", "scenes"), ("version", "1"))) in after, "names are unchanged"
    assert {sample.name for family in strict for sample in family.samples} == {name for name, _ in after}


def test_every_metric_of_the_scheduler_has_a_prometheus_name() -> None:
    for name, metric in METRICS.items():
        assert name.endswith("_total") == (metric.kind == "counter")

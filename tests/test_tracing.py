"""Traces, as a real OTLP receiver gets them: a span per request, stage and NFE, at their true times."""

import asyncio
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from server.gateway.app import create_app
from server.gateway.backend import TRACEPARENT, BackendError, BackendFault, GenerationRequest
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.settings import Settings
from server.gateway.traceparent import traceparent
from server.gateway.tracing import Tracing
from tests.conftest import ROOT, start_server

PATH = "/v1/images/generations"
CANARY = "canary-prompt-7261"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
INCOMING = f"00-{TRACE}-{PARENT}-01"


class Receiver:
    """An OTLP receiver over HTTP that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw: list[bytes] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.take(body, self.headers.get("content-encoding", ""))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, body: bytes, encoding: str) -> None:
        assert encoding in ("", "identity")
        self.raw.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def wait_for(self, count: int) -> list[Span]:
        """The spans, once there are so many."""
        end = time.monotonic() + 10
        while len(self.spans) < count:
            assert time.monotonic() < end, [span.name for span in self.spans]
            time.sleep(0.05)
        return self.spans


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()


@pytest.fixture
def app(tiny_backend: InProcessBackend, receiver: Receiver) -> Iterator[FastAPI]:
    app = create_app(tiny_backend, Settings())
    app.state.tracing = Tracing(receiver.url)
    yield app
    app.state.tracing.close()


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "") for pair in span.attributes}


def split(spans: list[Span]) -> tuple[Span, list[Span]]:
    """The request's span and its children by begin."""
    (request,) = (span for span in spans if span.kind == Span.SPAN_KIND_SERVER)
    children = sorted((span for span in spans if span is not request), key=lambda span: span.start_time_unix_nano)
    assert all((child.parent_span_id, child.trace_id) == (request.span_id, request.trace_id) for child in children)
    return request, children


def check_times(request: Span, children: list[Span], begin: int, end: int) -> None:
    """Children lie within the request, the request within what its caller saw, and NFEs follow one another."""
    assert begin <= request.start_time_unix_nano < request.end_time_unix_nano
    assert request.end_time_unix_nano <= end + 10**8, "the caller may have the last byte before we know that it is sent"
    for child in children:
        assert request.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
        assert child.end_time_unix_nano <= request.end_time_unix_nano
    steps = [child for child in children if child.name.startswith("nfe")]
    for earlier, later in itertools.pairwise(steps):
        assert earlier.end_time_unix_nano <= later.start_time_unix_nano


def test_a_request_is_a_span_with_one_child_per_stage_and_nfe(app: FastAPI, receiver: Receiver) -> None:
    begin = time.time_ns()
    body = {"prompt": CANARY, "seed": 7, "num_inference_steps": 3}
    assert TestClient(app).post(PATH, json=body).status_code == 200
    end = time.time_ns()
    app.state.tracing.close()
    request, children = split(receiver.spans)
    assert request.name == "generate_content tiny"
    assert [child.name for child in children] == [
        "text_encoder",
        "noise",
        "nfe1",
        "nfe2",
        "nfe3",
        "vae_decoder",
        "image_encode",
    ]
    said = attributes(request)
    assert said["gen_ai.operation.name"] == "generate_content"
    assert said["gen_ai.output.type"] == "image"
    assert (said["gen_ai.request.model"], said["gen_ai.request.seed"], said["fewstep.nfe"]) == ("tiny", 7, 3)
    assert (said["http.route"], said["http.response.status_code"]) == (PATH, 200)
    assert all(attributes(child)["fewstep.batch_size"] >= 1 for child in children if child.name.startswith("nfe"))
    assert request.status.code == Status.STATUS_CODE_UNSET
    check_times(request, children, begin, end)
    assert CANARY.encode() not in b"".join(receiver.raw)


def test_every_image_of_a_request_has_its_own_stages(app: FastAPI, receiver: Receiver) -> None:
    TestClient(app).post(PATH, json={"prompt": "a", "n": 3, "num_inference_steps": 1})
    app.state.tracing.close()
    _, children = split(receiver.spans)
    assert sorted(attributes(child)["fewstep.image_index"] for child in children if child.name == "nfe1") == [0, 1, 2]


def test_the_caller_s_trace_is_continued(app: FastAPI, receiver: Receiver) -> None:
    client = TestClient(app)
    client.post(PATH, json={"prompt": "a"}, headers={"traceparent": INCOMING})
    app.state.tracing.close()
    request, _ = split(receiver.spans)
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)


def test_a_caller_who_does_not_want_to_be_traced_is_not(app: FastAPI, receiver: Receiver) -> None:
    client = TestClient(app)
    assert client.post(PATH, json={"prompt": "a"}, headers={"traceparent": INCOMING[:-1] + "0"}).status_code == 200
    app.state.tracing.close()
    assert receiver.spans == []


def test_the_largest_seed_is_told_although_otlp_s_integers_have_a_sign(app: FastAPI, receiver: Receiver) -> None:
    TestClient(app).post(PATH, json={"prompt": "a", "seed": 2**64 - 1})
    app.state.tracing.close()
    assert attributes(split(receiver.spans)[0])["gen_ai.request.seed"] == str(2**64 - 1)


class FaultyBackend:
    """Fails with words that nobody outside may see."""

    def __init__(self, students: Any, error: BackendError) -> None:
        self.students, self.error = students, error

    async def ready(self) -> bool:
        return False

    async def generate(self, request: GenerationRequest, on_preview: Any = None) -> Any:
        raise self.error


def test_errors_are_told_by_type_alone(tiny_backend: InProcessBackend, receiver: Receiver) -> None:
    app = create_app(FaultyBackend(tiny_backend.students, BackendFault(f"failed on {CANARY}")), Settings())  # type: ignore[arg-type]
    app.state.tracing = Tracing(receiver.url)
    client = TestClient(app)
    assert client.post(PATH, json={"prompt": CANARY}).status_code == 500
    assert client.post(PATH, json={"prompt": "a", "steps": 9, "model": CANARY}).status_code == 404
    app.state.tracing.close()
    fault, refused = receiver.spans
    assert (fault.status.code, attributes(fault)["error.type"]) == (Status.STATUS_CODE_ERROR, "internal_error")
    assert (refused.status.code, attributes(refused)["error.type"]) == (Status.STATUS_CODE_UNSET, "model_not_found")
    assert refused.name == "generate_content"
    assert CANARY.encode() not in b"".join(receiver.raw)


@pytest.mark.skipif(sys.platform != "linux", reason="the Triton wheel exists for Linux alone")
def test_the_stages_that_ran_in_triton_s_process_are_traced_by_the_real_server(
    bundled_repository: Path, receiver: Receiver
) -> None:
    server = start_server(bundled_repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    begin = time.time_ns()
    answer = httpx.post(server.url + PATH, json={"prompt": CANARY, "num_inference_steps": 4}, timeout=60)
    end = time.time_ns()
    assert answer.status_code == 200
    assert server.stop() == 0
    request, children = split(receiver.spans)
    assert [child.name for child in children if child.name.startswith("nfe")] == ["nfe1", "nfe2", "nfe3", "nfe4"]
    check_times(request, children, begin, end)
    told = answer.json()["timings"]["steps"]
    traced = [
        (child.end_time_unix_nano - child.start_time_unix_nano) / 1e6 for child in children if child.name.startswith("nfe")
    ]
    assert traced == pytest.approx(told, abs=0.01)
    assert CANARY.encode() not in b"".join(receiver.raw)


def test_triton_is_told_the_trace_in_a_grpc_header() -> None:
    from server.gateway.triton_client import TritonClient

    heard: list[dict[str, Any]] = []

    class Listening(grpc.GenericRpcHandler):
        def service(self, details: Any) -> None:
            heard.append(dict(details.invocation_metadata))

    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((Listening(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def ask() -> None:
        TRACEPARENT.set(INCOMING)
        client = TritonClient(port)
        with pytest.raises(BackendError):
            await client.generate(GenerationRequest("tiny", "a", 1, 0, 1, "64x64"), 5)
        await client.close()

    asyncio.run(ask())
    server.stop(None)
    assert heard[0]["traceparent"] == INCOMING


@pytest.mark.parametrize(
    "value", ["", "nonsense", INCOMING.upper(), INCOMING + "\n", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"]
)
def test_a_malformed_context_is_not_passed_on(value: str) -> None:
    assert traceparent([(b"traceparent", INCOMING.encode())]) == INCOMING
    assert traceparent([(b"traceparent", value.encode())]) is None
    assert traceparent([(b"traceparent", INCOMING.encode())] * 2) is None


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_without_an_endpoint_nothing_of_opentelemetry_s_exporter_is_loaded() -> None:
    code = "import sys, server.gateway.serve as s; assert s.open_tracing(None) is None; print(*sys.modules)"
    assert not re.findall(r"opentelemetry\.(?:sdk|exporter)\S*", run(code))


def test_asked_for_and_not_installed_is_one_line_that_says_what_to_do() -> None:
    code = "import sys, server.gateway.serve as s; sys.modules['opentelemetry.exporter.otlp.proto.http'] = None\n"
    code += "try: s.open_tracing('http://127.0.0.1:1')\nexcept ValueError as error: print(error)"
    (line,) = run(code).splitlines()
    assert "fewstep[otel]" in line


def test_a_receiver_that_is_gone_holds_nobody_up(tiny_backend: InProcessBackend) -> None:
    app = create_app(tiny_backend, Settings())
    app.state.tracing = Tracing("http://127.0.0.1:1")
    begin = time.monotonic()
    assert json.loads(TestClient(app).post(PATH, json={"prompt": "a"}).content)["model"] == "tiny"
    assert time.monotonic() - begin < 2
    app.state.tracing.close()
    assert time.monotonic() - begin < 10

"""Logs: one line per entry whatever is thrown at it, everything an operator needs in it, nothing that is the caller's."""

import asyncio
import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.app import create_app
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.logs import JsonLines, TextLines, configure_logging
from server.gateway.settings import Settings

PATH = "/v1/images/generations"
NASTY = 'a\r\n{"level": "info"}\x1b[2J\u2028\u0085\x00\ud800'


@pytest.fixture(scope="module")
def app(tiny_repository: Path) -> Iterator[FastAPI]:
    backend = InProcessBackend(tiny_repository)
    asyncio.run(backend.start())
    yield create_app(backend, Settings())
    asyncio.run(backend.stop())


def entries(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What the JSON format makes of the requests that were logged."""
    return [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == "fewstep.request"]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "fewstep")
    return caplog


def test_a_request_is_one_entry_with_all_that_an_operator_asks_for(app: FastAPI, log: pytest.LogCaptureFixture) -> None:
    answer = TestClient(app).post(PATH, json={"prompt": "a", "num_inference_steps": 2}, headers={"x-request-id": "mine"})
    assert answer.status_code == 200
    (entry,) = entries(log)
    assert set(entry) == {
        *("time", "level", "logger", "message", "id", "method", "route", "model", "nfe", "status"),
        *("code", "ms", "queue_ms", "key"),
    }
    assert (entry["id"], entry["method"], entry["route"], entry["key"]) == ("mine", "POST", PATH, "anonymous")
    assert (entry["model"], entry["nfe"], entry["status"], entry["level"]) == ("tiny", 2, 200, "info")
    assert entry["ms"] > entry["queue_ms"] >= 0


def test_routes_are_named_by_their_template_and_models_only_when_served(app: FastAPI, log: pytest.LogCaptureFixture) -> None:
    client = TestClient(app)
    client.get("/v1/models/somebody-s-secret")
    client.get("/somebody-s-secret")
    client.post(PATH, json={"prompt": "a", "model": "somebody-s-secret"})
    assert [entry["route"] for entry in entries(log)] == ["/v1/models/{model}", "unmatched", PATH]
    assert "somebody-s-secret" not in "".join(map(JsonLines().format, log.records))


def test_probes_are_silent_until_they_fail(app: FastAPI, log: pytest.LogCaptureFixture) -> None:
    client = TestClient(app)
    for path in ("/livez", "/readyz", "/metrics"):
        assert client.get(path).status_code == 200
    assert entries(log) == []
    app.state.drain.draining = True
    try:
        client.get("/readyz")
    finally:
        app.state.drain.draining = False
    ((route, status, level),) = ((entry["route"], entry["status"], entry["level"]) for entry in entries(log))
    assert (route, status, level) == ("/readyz", 503, "warning")


@pytest.mark.parametrize("format", [JsonLines(), TextLines()])
@given(text=st.text() | st.just(NASTY))
def test_an_entry_is_one_line_whatever_is_in_it(format: logging.Formatter, text: str) -> None:
    record = logging.LogRecord("fewstep", logging.INFO, "", 0, "%s", (text,), None)
    record.fields = {"id": text, text: text}
    line = format.format(record)
    assert len(line.splitlines()) == 1
    assert line.isprintable()


def raised() -> logging.LogRecord:
    """An entry with a traceback whose message tries to pass for entries of its own."""
    try:
        raise RuntimeError(NASTY)
    except RuntimeError:
        return logging.LogRecord("fewstep", logging.ERROR, "", 0, "failed", (), sys.exc_info())


def test_a_traceback_is_a_field_of_its_entry() -> None:
    line = JsonLines().format(raised())
    assert len(line.splitlines()) == 1
    assert "RuntimeError" in json.loads(line)["traceback"]


def test_in_a_terminal_no_line_of_a_traceback_passes_for_an_entry() -> None:
    first, *rest = TextLines().format(raised()).splitlines()
    assert "failed" in first
    assert rest
    assert all(line.startswith(" | ") and line.isprintable() for line in rest)


def test_uvicorn_s_and_other_libraries_entries_go_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr, root = io.StringIO(), logging.getLogger()
    monkeypatch.setattr(sys, "stderr", stderr)
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("json")
        logging.getLogger("uvicorn.error").error("Invalid HTTP request\nreceived.")
        logging.getLogger("some.library").warning("hm")
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("fewstep").setLevel(logging.NOTSET)
    assert [json.loads(line)["logger"] for line in stderr.getvalue().splitlines()] == ["uvicorn.error", "some.library"]

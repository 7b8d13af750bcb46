"""stream: true, over a small student in process, and callers who go away, over real sockets."""

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from server.engine.engine import Engine
from server.engine.errors import NumericalError
from server.engine.request import Request
from server.engine.session import Tensors
from server.gateway.app import create_app
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.plan import spread
from server.gateway.settings import Settings

PATH = "/v1/images/generations"
BODY = {"prompt": "a red circle", "seed": 7, "stream": True}
NFE_SECONDS = 0.1


def parse(text: str) -> list[dict[str, Any]]:
    """The JSON of every event; the name of an event is its type."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name.removeprefix("event: ") == events[-1]["type"]
    return events


def pixels(event: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))).convert("RGB"))


@pytest.fixture(scope="module")
def client(tiny_backend: InProcessBackend) -> Iterator[TestClient]:
    with TestClient(create_app(tiny_backend, Settings(result_cache=False))) as client:
        yield client


def ask(client: TestClient, **changes: Any) -> list[dict[str, Any]]:
    answer = client.post(PATH, json=BODY | changes)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return parse(answer.text)


def test_the_streamed_image_is_the_plain_one_and_comes_last(client: TestClient) -> None:
    *partial, final = ask(client, partial_images=3)
    plain = client.post(PATH, json=BODY | {"stream": False})
    assert final["b64_json"] == plain.json()["data"][0]["b64_json"]
    assert final["pixel_sha256"] == plain.headers["x-pixel-sha256"]
    assert final["usage"] == plain.json()["usage"]
    assert [event["type"] for event in partial] == ["image_generation.partial_image"] * 3
    assert final["type"] == "image_generation.completed"
    assert [event["partial_image_index"] for event in partial] == [0, 1, 2]


def test_partial_images_are_the_predictions_after_their_nfes(client: TestClient, tiny_repository: Path) -> None:
    engine = Engine.open(tiny_repository / "tiny")
    progress = engine.prepare(Request("a red circle", 7, 0, 4, "64x64"))
    for event in ask(client, partial_images=3)[:-1]:
        assert engine.step([progress]) == [None]
        assert event["step"] == progress.step
        assert np.array_equal(pixels(event), engine.decode("64x64", [progress.x0])[0])


@pytest.mark.parametrize("partial_images", [None, 0])
def test_a_stream_without_partial_images_is_one_event(client: TestClient, partial_images: int | None) -> None:
    assert [event["type"] for event in ask(client, partial_images=partial_images)] == ["image_generation.completed"]


@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
@pytest.mark.parametrize("asked", [0, 1, 2, 3])
def test_partial_images_are_spread_over_the_nfes_before_the_last(nfe: int, asked: int) -> None:
    steps = spread(asked, nfe)
    assert len(steps) == min(asked, nfe - 1)
    assert list(steps) == sorted(set(steps))
    assert all(0 < step < nfe for step in steps)


def test_images_of_one_stream_are_those_of_their_indices(client: TestClient) -> None:
    events = ask(client, n=3, partial_images=1, num_inference_steps=2, output_format="webp")
    finals = {event["image_index"]: event for event in events if event["type"].endswith("completed")}
    plain = client.post(PATH, json=BODY | {"stream": False, "n": 3, "num_inference_steps": 2, "output_format": "webp"}).json()
    assert [finals[index]["b64_json"] for index in range(3)] == [image["b64_json"] for image in plain["data"]]
    assert sum(event["usage"]["total_tokens"] for event in finals.values()) == plain["usage"]["total_tokens"]
    for index in range(3):
        assert [event["type"] for event in events if event["image_index"] == index][-1].endswith("completed")


def test_what_fails_before_the_first_event_has_its_own_status(client: TestClient) -> None:
    answer = client.post(PATH, json=BODY | {"prompt": "a " * 20})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_what_fails_later_is_an_event_with_an_error(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.step

    def spoilt(self: Engine, batch: Any) -> Any:
        return [NumericalError("secret")] if batch[0].step == 2 else real(self, batch)

    monkeypatch.setattr(Engine, "step", spoilt)
    *shown, last = ask(client, partial_images=3)
    assert [event["type"] for event in shown] == ["image_generation.partial_image"] * 2
    assert last["error"]["code"] == "numerical_error"
    assert "secret" not in json.dumps(last)


# --- callers who go away --------------------------------------------------------------------------------------------------


@dataclass
class SlowStep:
    """A session that takes its time, so that a test can act between two NFEs."""

    session: Any

    def run(self, tensors: Tensors) -> Any:
        time.sleep(NFE_SECONDS)
        return self.session.run(tensors)


@dataclass
class Running:
    """The gateway behind a real uvicorn, with a student whose NFEs take NFE_SECONDS."""

    port: int
    backend: InProcessBackend

    @property
    def executed(self) -> float:
        return self.backend.metrics["tiny"].total("fewstep_steps_executed_total")

    @property
    def cancelled(self) -> float:
        return self.backend.metrics["tiny"].total("fewstep_cancelled_total")


@pytest.fixture(scope="module")
def slow(tiny_repository: Path) -> Iterator[Running]:
    backend = InProcessBackend(tiny_repository)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(backend, Settings(result_cache=False)), log_config=None, lifespan="off"))
    ready = threading.Event()

    async def run() -> None:
        await backend.start()
        sessions = backend.schedulers["tiny"].engine.sessions
        sessions["student_step"] = SlowStep(sessions["student_step"])
        ready.set()
        await server.serve([listener])
        await backend.stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    ready.wait(30)
    yield Running(listener.getsockname()[1], backend)
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_socket_stops_the_work_within_one_nfe(slow: Running, stream: bool) -> None:
    executed, cancelled = slow.executed, slow.cancelled
    body = json.dumps(BODY | {"stream": stream, "num_inference_steps": 4}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", slow.port)) as caller:
        caller.sendall(head.encode() + body)
        while slow.executed == executed:
            time.sleep(0.005)
    begun = slow.executed - executed
    time.sleep(5 * NFE_SECONDS)
    assert slow.cancelled == cancelled + 1
    assert slow.executed - executed <= begun + 1 < 4


def test_a_neighbour_of_who_goes_away_gets_the_same_pixels(slow: Running) -> None:
    url = f"http://127.0.0.1:{slow.port}{PATH}"
    plain = {"prompt": "a red circle", "seed": 7}
    alone = httpx.post(url, json=plain).headers["x-pixel-sha256"]
    answers: list[httpx.Response] = []
    neighbour = threading.Thread(target=lambda: answers.append(httpx.post(url, json=plain)))
    neighbour.start()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=plain | {"seed": 8}, timeout=httpx.Timeout(5, read=2 * NFE_SECONDS))
    neighbour.join()
    assert answers[0].headers["x-pixel-sha256"] == alone


def test_a_deadline_is_a_504_and_no_nfe_runs_after_it(slow: Running) -> None:
    time.sleep(2 * NFE_SECONDS)  # for what other tests left behind
    executed = slow.executed
    timeout = {"x-request-timeout-ms": str(int(1500 * NFE_SECONDS))}
    answer = httpx.post(f"http://127.0.0.1:{slow.port}{PATH}", json={"prompt": "a"}, headers=timeout)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    time.sleep(3 * NFE_SECONDS)
    assert slow.executed - executed <= 2

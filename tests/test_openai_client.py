"""An unmodified openai client against the real server."""

import asyncio
import base64
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from server.gateway.app import create_app
from server.gateway.backend import BackendUnavailable
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.serve import listen
from server.gateway.settings import Settings
from tests.conftest import Server

ASKED: dict[str, Any] = {"model": "scenes", "prompt": "a large yellow star on a purple background", "extra_body": {"seed": 7}}
NEW: dict[str, Any] = ASKED | {"prompt": "a small green ring in the top left"}  # nobody else asks for it: not in the cache


@pytest.fixture
def client(triton_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{triton_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_it_gets_a_picture(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        model="scenes",
        prompt="a large yellow star on a purple background",
        n=2,
        quality="medium",
        output_format="webp",
        extra_body={"seed": 7},
    )
    assert answer.data is not None
    assert answer.usage is not None
    assert len(answer.data) == 2
    assert answer.output_format == "webp"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    picture = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or "")))
    assert f"{picture.width}x{picture.height}" == answer.size


def test_it_lists_the_models(client: openai.OpenAI) -> None:
    assert "scenes" in [model.id for model in client.models.list()]
    assert client.models.retrieve("scenes").owned_by == "fewstep"


def test_it_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="scenes", prompt="a", extra_body={"num_inference_steps": 9})
    assert caught.value.param == "num_inference_steps"
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(model="gpt-image-1", prompt="a")
    assert missing.value.code == "model_not_found"


def pixels(b64_json: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json or ""))).convert("RGB"))


def test_it_streams_partial_images_that_come_closer_to_the_final_one(client: openai.OpenAI) -> None:
    with client.images.generate(**NEW, quality="high", stream=True, partial_images=2) as stream:
        events = list(stream)
    *partial, final = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]  # type: ignore[union-attr]
    assert final.type == "image_generation.completed"
    assert final.usage.total_tokens == final.usage.input_tokens + final.usage.output_tokens
    plain = client.images.generate(**NEW, quality="high")
    assert plain.data is not None
    assert final.b64_json == plain.data[0].b64_json
    first, second = (np.abs(pixels(event.b64_json) - pixels(final.b64_json).astype(float)).mean() for event in partial)
    assert first > second > 0


def test_an_error_before_a_stream_is_raised_as_itself(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="scenes", prompt="", stream=True)
    assert caught.value.param == "prompt"


def test_the_asynchronous_client_gets_many_at_once_and_streams(triton_server: Server) -> None:
    async def ask() -> tuple[list[str | None], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{triton_server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(*(client.images.generate(**ASKED, quality="low") for _ in range(4)))
            stream = await client.images.generate(**NEW, quality="medium", stream=True, partial_images=1)
            return [answer.data[0].b64_json for answer in answers if answer.data], [event.type async for event in stream]

    images, events = asyncio.run(ask())
    assert len(images) == 4
    assert len(set(images)) == 1
    assert events == ["image_generation.partial_image", "image_generation.completed"]


def test_its_raw_response_shows_our_headers(client: openai.OpenAI) -> None:
    told = {"x-request-id": "from-the-caller", "cache-control": "no-cache"}
    raw = client.images.with_raw_response.generate(**ASKED, extra_headers=told)
    assert raw.headers["x-seed"] == "7"
    assert raw.headers["x-request-id"] == raw.request_id == "from-the-caller"
    assert "nfe4;dur=" in raw.headers["server-timing"]
    assert raw.parse().size == "128x128"


def test_its_errors_carry_the_request_id(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(model="scenes", prompt="a", size="1x1", extra_headers={"x-request-id": "mine"})  # type: ignore[call-overload]
    assert caught.value.request_id == "mine"
    assert caught.value.body == caught.value.response.json()["error"]


class Recovering(InProcessBackend):
    """Is unavailable for its first `failures` images after the warm-up."""

    failures = 0
    asked = 0

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise BackendUnavailable("down for now")
        return await super().generate(*arguments, **named)


@pytest.fixture
def recovering(tiny_repository: Path) -> Iterator[tuple[str, Recovering]]:
    """A real server whose backend can be told to fail, and its address."""
    backend = Recovering(tiny_repository)
    listener = listen("127.0.0.1", 0)
    app = create_app(backend, Settings())
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    ready = threading.Event()

    async def run() -> None:
        await backend.start()
        ready.set()
        await server.serve([listener])
        await backend.stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(30)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", backend
    server.should_exit = True
    thread.join()


def test_it_retries_a_503_by_itself_after_as_long_as_it_was_told(recovering: tuple[str, Recovering]) -> None:
    url, backend = recovering
    backend.failures, backend.asked = 1, 0
    told = httpx.post(f"{url}/images/generations", json={"prompt": "a"})
    assert told.status_code == 503
    wait = float(told.headers["retry-after"])
    backend.failures, backend.asked = 1, 0
    begin = time.monotonic()
    with openai.OpenAI(base_url=url, api_key="none", max_retries=1) as client:
        assert client.images.generate(model="tiny", prompt="a").data
    assert backend.asked == 2
    assert wait <= time.monotonic() - begin < wait + 3


def test_it_does_not_retry_what_would_fail_again(recovering: tuple[str, Recovering]) -> None:
    url, backend = recovering
    backend.asked = 0
    with openai.OpenAI(base_url=url, api_key="none", max_retries=5) as client, pytest.raises(openai.BadRequestError):
        client.images.generate(model="tiny", prompt="a " * 20)
    assert backend.asked == 1

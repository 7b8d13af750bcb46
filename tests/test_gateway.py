"""The HTTP contract, over a small student in process and over backends that fail on purpose."""

import asyncio
import base64
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from server.engine.engine import Engine
from server.engine.request import Request
from server.gateway.app import create_app
from server.gateway.backend import (
    BackendFault,
    BackendTimeout,
    BackendUnavailable,
    InvalidRequest,
    NumericalError,
)
from server.gateway.errors import ApiError
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.plan import find_student
from server.gateway.settings import Settings

PATH = "/v1/images/generations"
BODY = {"prompt": "a red circle", "seed": 7}


@pytest.fixture(scope="module")
def client(tiny_backend: InProcessBackend) -> Iterator[TestClient]:
    with TestClient(create_app(tiny_backend, Settings(result_cache=False))) as client:
        yield client


def ask(client: TestClient, accept: str = "*/*", **changes: Any) -> httpx.Response:
    return client.post(PATH, json=BODY | changes, headers={"accept": accept})


def pixels(contents: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(contents)).convert("RGB"))


def assert_envelope(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error


def test_an_answer_has_the_contract_s_fields_and_nothing_else(client: TestClient) -> None:
    answer = ask(client, num_inference_steps=2).json()
    assert set(answer) == {
        *("created", "data", "size", "quality", "output_format", "background", "usage", "model"),
        *("num_inference_steps", "fingerprint", "timings"),
    }
    assert set(answer["data"][0]) == {"b64_json", "seed", "image_index", "cached"}
    assert set(answer["timings"]) == {"queue", "text_encoder", "steps", "vae_decoder", "image_encode", "total"}
    assert len(answer["timings"]["steps"]) == answer["num_inference_steps"] == 2
    assert answer["usage"]["input_tokens"] == answer["usage"]["input_tokens_details"]["text_tokens"] == 4
    assert (answer["model"], answer["size"], answer["quality"]) == ("tiny", "64x64", "medium")


def test_the_picture_is_the_engine_s_bit_for_bit(client: TestClient, tiny_repository: Path) -> None:
    expected = Engine.open(tiny_repository / "tiny").run(Request("a red circle", 7, 0, 4, "64x64"))
    raw = ask(client, "image/png")
    assert np.array_equal(pixels(raw.content), expected.image)
    assert np.array_equal(pixels(base64.b64decode(ask(client).json()["data"][0]["b64_json"])), expected.image)
    assert raw.headers["x-pixel-sha256"] == hashlib.sha256(expected.image.tobytes()).hexdigest()
    assert raw.headers["x-fingerprint"] == expected.fingerprint


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_every_format_is_sent_raw_and_as_json(client: TestClient, format: str) -> None:
    raw = ask(client, f"image/{format}")
    assert raw.headers["content-type"] == f"image/{format}"
    document = ask(client, output_format=format).json()
    assert document["output_format"] == format
    assert base64.b64decode(document["data"][0]["b64_json"]) == raw.content
    assert Image.open(io.BytesIO(raw.content)).format == format.upper()


def test_compression_makes_a_jpeg_smaller(client: TestClient) -> None:
    large, small = (ask(client, "image/jpeg", output_compression=quality).content for quality in (95, 10))
    assert len(small) < len(large)


def test_image_i_of_n_is_the_image_asked_for_by_its_index(client: TestClient) -> None:
    several = ask(client, n=3, image_index=5).json()["data"]
    assert [image["image_index"] for image in several] == [5, 6, 7]
    for image in several:
        assert ask(client, image_index=image["image_index"]).json()["data"][0]["b64_json"] == image["b64_json"]
    assert len({image["b64_json"] for image in several}) == 3


def test_a_drawn_seed_is_returned_and_makes_the_image_again(client: TestClient) -> None:
    first = client.post(PATH, json={"prompt": "a"}, headers={"accept": "image/png"})
    seed = int(first.headers["x-seed"])
    assert ask(client, "image/png", prompt="a", seed=seed).content == first.content
    assert client.post(PATH, json={"prompt": "a"}).json()["data"][0]["seed"] != seed


@pytest.mark.parametrize(("quality", "nfe"), [("low", 1), ("medium", 2), ("high", 4), ("auto", 4), (None, 4)])
def test_quality_stands_for_an_nfe_count(client: TestClient, quality: str | None, nfe: int) -> None:
    assert ask(client, quality=quality).json()["num_inference_steps"] == nfe
    assert ask(client, quality=quality, steps=3).json()["num_inference_steps"] == 3


@pytest.mark.parametrize("accept", ["image/webp", "application/json"])
def test_an_image_the_caller_has_is_a_304_without_work(client: TestClient, accept: str) -> None:
    backend: InProcessBackend = client.app.state.backend  # type: ignore[attr-defined]
    first = ask(client, accept)
    executed = backend.metrics["tiny"].total("fewstep_steps_executed_total")
    known = {"accept": accept, "if-none-match": f'"other", {first.headers["etag"]}'}
    again = client.post(PATH, json=BODY, headers=known)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert backend.metrics["tiny"].total("fewstep_steps_executed_total") == executed
    for change in ({"seed": 8}, {"prompt": "b"}, {"num_inference_steps": 1}, {"size": "64x32"}, {"image_index": 1}):
        other = client.post(PATH, json=BODY | change, headers=known)
        assert (other.status_code, other.headers["etag"] == first.headers["etag"]) == (200, False)


def test_without_a_seed_there_is_no_304(client: TestClient) -> None:
    seedless = {"prompt": "a red circle"}
    first = client.post(PATH, json=seedless)
    assert client.post(PATH, json=seedless, headers={"if-none-match": first.headers["etag"]}).status_code == 200


@pytest.mark.parametrize("timeout", ["0", "-1", "1.5", "soon", "1e3", "\u0663", "9" * 40])
def test_an_illegal_timeout_is_a_400(client: TestClient, timeout: str) -> None:
    answer = client.post(PATH, json=BODY, headers={"x-request-timeout-ms": timeout.encode()})
    assert assert_envelope(answer, 400)["param"] == "x-request-timeout-ms"


def test_server_timing_has_one_entry_per_nfe_and_sums_to_the_total(client: TestClient) -> None:
    header = ask(client, "image/png", num_inference_steps=3).headers["server-timing"]
    entries = dict(re.findall(r"(\w+);dur=([0-9.]+)", header))
    assert list(entries) == ["queue", "text_encoder", "nfe1", "nfe2", "nfe3", "vae_decoder", "image_encode", "total"]
    durations = {name: float(value) for name, value in entries.items()}
    total = durations.pop("total")
    assert sum(durations.values()) == pytest.approx(total, abs=0.02)


def test_harmless_openai_fields_are_accepted(client: TestClient) -> None:
    harmless = {"background": "opaque", "moderation": "low", "style": "natural", "user": "u", "safety_identifier": "s"}
    neutral = {"guidance_scale": 1, "negative_prompt": "", "stream": False, "partial_images": 0, "response_format": "b64_json"}
    assert ask(client, size="auto", n=None, **harmless, **neutral).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, "prompt"),
        ({"prompt": "a" * 101}, "prompt"),
        ({"prompt": "a " * 20}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"size": "0x0"}, "size"),
        ({"size": "64x64x2"}, "size"),
        ({"size": "-64x64"}, "size"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 5}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"num_inference_steps": 10**30}, "num_inference_steps"),
        ({"steps": True}, "steps"),
        ({"steps": 9}, "steps"),
        ({"steps": 1, "num_inference_steps": 2}, None),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"seed": 7.0}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"image_index": 2**32}, "image_index"),
        ({"image_index": 2**32 - 1, "n": 2}, "image_index"),
        ({"quality": "hd"}, "quality"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"response_format": "path"}, "response_format"),
        ({"partial_images": 1}, "partial_images"),
        ({"background": "transparent"}, "background"),
        ({"style": "vivid"}, "style"),
        ({"guidance_scale": 7.5}, "guidance_scale"),
        ({"negative_prompt": "ugly"}, "negative_prompt"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_an_illegal_value_is_a_400_that_names_the_field(client: TestClient, changes: dict[str, Any], param: str | None) -> None:
    error = assert_envelope(ask(client, **changes), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "\n" not in error["message"]


def test_illegal_sizes_and_steps_are_answered_with_the_legal_ones(client: TestClient) -> None:
    assert "64x64, 64x32" in ask(client, size="1x1").json()["error"]["message"]
    assert "1, 2, 3, 4" in ask(client, steps=7).json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"a"',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "guidance_scale": NaN}',
        b'{"prompt": "a", "guidance_scale": -Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_malformed_body_is_a_400(client: TestClient, body: bytes) -> None:
    assert_envelope(client.post(PATH, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("prompt", ["a\x00b", "אדום", "🔴", 'a"; DROP\r\nINFO fake', "a\u202eb"])
def test_a_strange_prompt_is_a_picture(client: TestClient, prompt: str) -> None:
    assert ask(client, prompt=prompt).status_code == 200


def test_only_json_is_understood(client: TestClient) -> None:
    assert_envelope(client.post(PATH, data={"prompt": "a"}), 415)
    assert_envelope(
        client.post(PATH, content=b"{}", headers={"content-type": "application/json", "content-encoding": "gzip"}), 415
    )
    assert client.post(PATH, content=json.dumps(BODY), headers={"content-type": "application/json; charset=utf-8"}).is_success


def test_a_large_body_is_a_413(client: TestClient) -> None:
    body = json.dumps(BODY | {"prompt": "a" * Settings().max_body_bytes}).encode()
    assert_envelope(client.post(PATH, content=body, headers={"content-type": "application/json"}), 413)


def test_a_body_that_does_not_come_is_a_408(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.gateway.body.BODY_SECONDS", 0.05)
    sent: list[Any] = []
    chunks = [{"type": "http.request", "body": b'{"prompt"', "more_body": True}]

    async def receive() -> Any:
        return chunks.pop() if chunks else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "headers": headers, "query_string": b""}
    asyncio.run(client.app(scope, receive, send))
    assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]) == (408, "body_timeout")
    assert (b"connection", b"close") in sent[0]["headers"]


def test_accept_and_body_must_not_contradict_each_other(client: TestClient) -> None:
    assert assert_envelope(ask(client, "image/png", n=2), 400)["param"] == "n"
    assert assert_envelope(ask(client, "image/png", output_format="webp"), 400)["param"] == "output_format"
    assert assert_envelope(ask(client, "image/png", stream=True), 400)["param"] == "stream"


def test_a_student_of_videos_is_neither_the_default_nor_legal_for_images(client: TestClient) -> None:
    (image,) = client.app.state.backend.students.values()
    video = dataclasses.replace(image, name="motion", media_type="video")
    students = {"motion": video, image.name: image}
    assert find_student(None, students, "image") is find_student(None, students) is image
    assert find_student(None, students, "video") is find_student("motion", students) is video
    with pytest.raises(ApiError, match=f"'motion' makes no images; those that do are {image.name}") as refused:
        find_student("motion", students, "image")
    assert (refused.value.status, refused.value.param) == (400, "model")
    for name in (None, "motion"):
        with pytest.raises(ApiError, match="no student that makes images is served here, only motion") as missing:
            find_student(name, {"motion": video}, "image")
        assert (missing.value.status, missing.value.code) == (404, "model_not_found")


def test_unknown_models_and_paths_are_404_and_wrong_methods_405(client: TestClient) -> None:
    assert assert_envelope(ask(client, model="gpt-image-1"), 404)["code"] == "model_not_found"
    assert assert_envelope(client.get("/v1/models/none"), 404)["code"] == "model_not_found"
    assert_envelope(client.get("/v1/nothing"), 404)
    answer = client.get(PATH)
    assert_envelope(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_models_say_what_is_legal(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    model = listed["data"][0]
    assert model == client.get("/v1/models/tiny").json()
    assert (model["id"], model["object"], model["nfe"], model["sizes"]) == ("tiny", "model", [1, 2, 3, 4], ["64x64", "64x32"])
    assert (model["media_type"], model["frames"], model["fps"]) == ("image", None, None)
    assert model["fingerprint"] == ask(client).json()["fingerprint"]


def test_the_default_student_is_told_to_scripts_that_ask_for_it(client: TestClient) -> None:
    assert client.get("/v1/model_info").json() == {"model_path": "tiny", "model": client.get("/v1/models/tiny").json()}


def test_health_routes_and_documentation_answer(client: TestClient) -> None:
    for path in ("/livez", "/readyz", "/health", "/docs"):
        assert client.get(path).status_code == 200
    schema = client.get("/openapi.json").json()
    described = schema["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "seed", "num_inference_steps"} <= set(described["properties"])


def test_a_caller_s_request_id_is_kept_when_it_is_fit_for_a_log(client: TestClient) -> None:
    assert client.get("/livez", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")


class FailingBackend:
    """Serves a student whose every image fails with one error."""

    def __init__(self, students: Any, error: Exception) -> None:
        self.students, self.error = students, error

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def ready(self) -> bool:
        return False

    async def generate(self, request: Any, on_preview: Any = None) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BackendUnavailable("starting"), 503, "backend_unavailable"),
        (BackendTimeout("slow"), 504, "deadline_exceeded"),
        (BackendFault("secret /path tensor_name"), 500, "internal_error"),
        (NumericalError("secret"), 500, "numerical_error"),
        (RuntimeError("secret"), 500, "internal_error"),
        (InvalidRequest("too many tokens", "prompt"), 400, "invalid_value"),
    ],
)
def test_a_failing_backend_becomes_the_right_status(client: TestClient, error: Exception, status: int, code: str) -> None:
    students = client.app.state.backend.students  # type: ignore[attr-defined]
    with TestClient(create_app(FailingBackend(students, error), Settings())) as failing:
        answer = ask(failing, n=2)
        assert assert_envelope(answer, status)["code"] == code
        assert "secret" not in answer.text
        assert ("retry-after" in answer.headers) == (status == 503)
        assert_envelope(failing.get("/readyz"), 503)
        assert failing.get("/livez").status_code == 200


def test_before_the_backend_has_said_what_it_serves_a_request_is_a_503() -> None:
    with TestClient(create_app(FailingBackend({}, RuntimeError()), Settings())) as starting:
        answer = ask(starting)
        assert_envelope(answer, 503)
        assert answer.headers["retry-after"]

"""Hostile input to /v1/videos, over real sockets against the real server; see test_hostile.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Server, start_server
from tests.test_hostile import (
    FAST_SECONDS,
    FLAT_MEGABYTES,
    INSIDE,
    JSON,
    MEGABYTE,
    PROMPTS,
    WORDS,
    answer_to,
    chunked,
    head,
    peak,
)

PATH = "/v1/videos"
FORM = "multipart/form-data; boundary=x"
NO_ID = f"video_{'0' * 32}"


@pytest.fixture(scope="module")
def server(clips_repository: Path) -> Iterator[Server]:
    server = start_server(clips_repository, "inprocess")
    yield server
    assert server.stop() == 0


@pytest.fixture(autouse=True)
def _healthy_afterwards(server: Server) -> Iterator[None]:
    """Whatever a test does, the next caller is served."""
    yield
    assert httpx.post(f"{server.url}{PATH}/sync", json={"prompt": "a"}, timeout=30).status_code == 200


def large_forms() -> dict[str, tuple[bytes, int]]:
    """Name -> a form, and the status it deserves."""
    part = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\na\r\n'
    return {
        "100,000 parts": (part * 100_000 + b"--x--\r\n", 413),
        "as many parts as are let in": (part * 15_000 + b"--x--\r\n", 400),
        "as many files": (file * 12_000 + b"--x--\r\n", 400),
        "100,000 parts without a head": (b"--x\r\n\r\n\r\n" * 100_000 + b"--x--\r\n", 400),
        "a long name": (b'--x\r\nContent-Disposition: form-data; name="' + b"n" * 900_000 + b'"\r\n\r\na\r\n--x--\r\n', 400),
        "many heads": (b"--x\r\n" + b"A: b\r\n" * 150_000 + b"\r\na\r\n--x--\r\n", 400),
        "a long value": (part.replace(b"\r\na", b"\r\n" + b"a" * 900_000) + b"--x--\r\n", 400),
        "64 MB": (part.replace(b"\r\na", b"\r\n" + b"a" * (64 * MEGABYTE)), 413),
    }


@pytest.mark.parametrize("name", large_forms())
def test_a_large_form_is_refused_fast_and_at_flat_memory(server: Server, name: str) -> None:
    before = peak(server)
    body, expected = large_forms()[name]
    status, said, seconds = answer_to(server, [head(len(body), PATH, Content_Type=FORM), body])
    assert status == expected, said
    assert set(json.loads(said)["error"]) == {"message", "type", "param", "code"}
    assert not INSIDE.search(json.loads(said)["error"]["message"])
    assert seconds < FAST_SECONDS
    assert peak(server) - before < FLAT_MEGABYTES


def test_a_form_in_chunks_is_bounded_too(server: Server) -> None:
    status, _, seconds = answer_to(server, [head(None, PATH, Content_Type=FORM), *chunked([b"a" * MEGABYTE] * 3)])
    assert status == 413
    assert seconds < FAST_SECONDS


def test_a_body_of_both_kinds_at_once_is_refused(server: Server) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    for body in (form, b'{"prompt": "a"}'):
        twice = head(len(body), PATH).replace(b"\r\n\r\n", f"\r\nContent-Type: {FORM}\r\n\r\n".encode())
        status, said, _ = answer_to(server, [twice, body])
        assert (status, json.loads(said)["error"]["code"]) == (400, "malformed_body")


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_a_strange_prompt_is_a_job_or_a_400(server: Server, prompt: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.url + PATH, content=b'{"seed": 7, "prompt": %b}' % prompt.encode(), headers=headers, timeout=30)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] in ("prompt", None)
    else:
        again = httpx.get(f"{server.url}{PATH}/{answer.json()['id']}").json()
        assert again["prompt"] == json.loads(prompt)


VALUES = {
    "seconds": ["0", "-1", "4", '"4"', "1e400", "true", "[]", '"3.125s"', '""', '"NaN"'],
    "fps": ["0", "24", "8.0", '"8"', "1e9", "true"],
    "num_frames": ["0", "-25", "49", "25.0", '"25"'],
    "size": ['"720x1280"', "0", '"0x0"', '"64x32x25"'],
    "seed": ["-1", str(2**64), "7.0", '"7"'],
    "num_inference_steps": ["0", "5", "2.5", '"4"', "50"],
    "partial_images": ["-1", "4", "1.5"],
    "guidance_scale": ["6", "1e400"],
    "negative_prompt": ['"blurry"', "1"],
    "input_reference": ['"https://a.example/a.png"', "{}"],
    "n": ["1"],
    "stream": ["true"],
    "\\u0000": ["1"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in VALUES.items() for value in values])
def test_an_illegal_value_is_a_400_that_names_its_field(server: Server, field: str, value: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.url + PATH, content=f'{{"prompt": "a", "{field}": {value}}}', headers=headers, timeout=30)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == json.loads(f'"{field}"')
    assert "\n" not in answer.json()["error"]["message"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT"]),
    path=st.sampled_from(["", "/sync", f"/{NO_ID}/content", f"/{NO_ID}/events", f"/{NO_ID}/cancel"])
    | WORDS.map(lambda name: f"/{quote(name)}")
    | WORDS.map(lambda name: f"?after={quote(name)}")
    | WORDS.map(lambda name: f"/{NO_ID}/content?variant={quote(name)}"),
    body=st.dictionaries(
        st.sampled_from([*(name for name in VALUES if name.isidentifier()), "prompt"]) | WORDS, JSON, max_size=4
    ),
)
def test_no_error_shows_the_inside(server: Server, method: str, path: str, body: Any) -> None:
    headers = {"Content-Type": "application/json"}
    content = json.dumps(body).encode() if method == "POST" else None
    answer = httpx.request(method, server.url + PATH + path, content=content, headers=headers, timeout=30)
    assert answer.status_code < 500
    if answer.status_code >= 400:
        message = answer.json()["error"]["message"].replace(PATH, "").replace("/docs", "")
        assert not INSIDE.search(message.replace(path, "")), message
        assert "\n" not in message

"""A form means what JSON would have meant, and nothing in it is guessed, repaired or left out."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st

from server.gateway.errors import ApiError
from server.gateway.form import MOST_FIELDS, read_json_or_form
from server.gateway.schemas import VideoGeneration

FORM = "multipart/form-data; boundary=x"
VALUES: dict[str, Any] = {
    "prompt": "a red\r\n circle 🔴",
    "model": "motion",
    "seconds": "2",
    "size": "64x64",
    "seed": 2**64 - 1,
}
VALUES |= {"num_inference_steps": 4, "steps": 4, "fps": 8, "num_frames": 16, "guidance_scale": 1.0, "partial_images": 3}


def read(body: bytes, *content_types: str) -> VideoGeneration:
    """What the gateway understands of a body with these Content-Type headers."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return messages.pop()

    headers = [(b"content-type", kind.encode("latin-1")) for kind in content_types]
    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "headers": headers, "query_string": b""}
    return asyncio.run(read_json_or_form(Request(scope, receive), VideoGeneration))


def part(name: str, value: str, more: str = "") -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'.encode()


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--x--\r\n"


def refused(body: bytes, *content_types: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(body, *content_types)
    return caught.value


def test_a_form_and_json_mean_the_same() -> None:
    request = httpx.Request("POST", "http://a", files={name: (None, str(value)) for name, value in VALUES.items()})
    by_form = read(request.read(), request.headers["content-type"])
    assert by_form == read(json.dumps(VALUES).encode(), "application/json") == VideoGeneration(**VALUES)


@given(prompt=st.text(min_size=1, max_size=50).filter(lambda text: text.isprintable()), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_text_stays_as_it_is_also_where_it_looks_like_a_number_or_json(prompt: str, seed: int) -> None:
    for text in (prompt, str(seed), "null", "true", "1e5", '{"a": 1}', " "):
        assert read(form(part("prompt", text), part("seed", str(seed))), FORM) == VideoGeneration(prompt=text, seed=seed)


@pytest.mark.parametrize("value", ["", " ", "4.0", "1e1", "four", "true", "null", "NaN", "1_0", "0x4", "+4", "[4]", "9" * 5000])
def test_what_is_no_whole_number_in_json_is_none_in_a_form(value: str) -> None:
    error = refused(form(part("prompt", "a"), part("steps", value)), FORM)
    assert (error.status, error.param) == (400, "steps")
    assert len(error.message) < 300


def test_unknown_repeated_and_missing_fields_are_refused_by_name() -> None:
    assert refused(form(part("prompt", "a"), part("sead", "7")), FORM).param == "sead"
    assert "twice" in refused(form(part("prompt", "a"), part("prompt", "a")), FORM).message
    assert refused(form(part("size", "64x64")), FORM).code == "missing_required_parameter"
    assert refused(form(), FORM).status == 400


@pytest.mark.parametrize("more", ['; filename="a.png"', '; filename=""', '; filename="a"\r\nContent-Type: image/png'])
def test_a_file_is_refused_by_the_name_of_its_field(more: str) -> None:
    error = refused(form(part("prompt", "a"), part("input_reference", "PNG", more)), FORM)
    assert (error.status, error.param) == (400, "input_reference")
    assert "is a file" in error.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"prompt": "a"}',
        part("prompt", "a"),
        part("prompt", "a") + b"--x",
        part("prompt", "a") + part("size", "64x64")[:-3],
        b"--y--\r\n",
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
        b"--x\r\n\r\na\r\n--x--\r\n",
        form(part("prompt", "\x00")).replace(b"\x00", b"\xff"),
    ],
)
def test_a_body_that_is_no_whole_form_is_malformed(body: bytes) -> None:
    error = refused(body, FORM)
    assert (error.status, error.code) == (400, "malformed_form")


def test_a_body_of_both_kinds_is_refused_whichever_comes_first() -> None:
    for body in (form(part("prompt", "a")), b'{"prompt": "a"}'):
        for kinds in ((FORM, "application/json"), ("application/json", FORM)):
            assert refused(body, *kinds).code == "malformed_body"
    assert refused(form(part("prompt", "a")), "application/json").code == "malformed_json"


def test_other_types_and_charsets_are_not_guessed_at() -> None:
    body = form(part("prompt", "ä"))
    assert refused(body, "application/x-www-form-urlencoded").status == 415
    assert refused(body).status == 415
    assert refused(body, f"{FORM}; charset=utf-16").status == 415
    assert refused(body, "multipart/form-data").status == 400
    assert refused(body, "multipart/form-data; boundary=").status == 400
    assert (
        read(body, f"{FORM}; charset=UTF-8") == read(body, 'Multipart/Form-Data; boundary="x"') == VideoGeneration(prompt="ä")
    )


def test_many_parts_are_refused() -> None:
    many = [part(f"x{index}", "") for index in range(MOST_FIELDS + 1)]
    assert str(MOST_FIELDS) in refused(form(*many), FORM).message
    files = [part(f"x{index}", "", '; filename="a"') for index in range(MOST_FIELDS + 1)]
    assert refused(form(*files), FORM).code == "malformed_form"

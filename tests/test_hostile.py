"""Hostile input, over real sockets against the real server: refused fast, at flat memory, without a word about the inside."""

import gzip
import http.client
import json
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Server, start_server

PATH = "/v1/images/generations"
BODY = {"prompt": "a red circle", "seed": 7}
MEGABYTE = 1 << 20
FAST_SECONDS = 2.0  # on a busy machine; an honest refusal takes milliseconds
FLAT_MEGABYTES = 24
CROWD = 1000
# What an error must not show: paths, stack traces, names of Python's or of a graph's things.
INSIDE = re.compile(
    r"""(/\w+){2,}\.\w+ | /(home|tmp|usr|work|root|opt|proc)/ | site-packages | Traceback | File\ " | \.py\b | line\ \d+\ in
    | onnx | triton | pydantic | numpy | starlette | uvicorn | Error\b(?!") | Exception | object\ at\ 0x
    | text_emb | latents | x0_prev | coefficients | student_step | vae_decoder | text_encoder""",
    re.VERBOSE | re.IGNORECASE,
)


@pytest.fixture(scope="module")
def server(tiny_repository: Path) -> Iterator[Server]:
    """The small student behind the real gateway."""
    server = start_server(tiny_repository, "inprocess")
    assert httpx.post(server.url + PATH, json=BODY).status_code == 200
    yield server
    assert server.stop() == 0


@pytest.fixture(autouse=True)
def _healthy_afterwards(server: Server) -> Iterator[None]:
    """Whatever a test does, the next caller is served."""
    yield
    assert httpx.post(server.url + PATH, json=BODY, timeout=10).status_code == 200


def connect(server: Server) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def head(length: int | None = None, path: str = PATH, **headers: str) -> bytes:
    """The head of a POST; without a length the body is chunked."""
    fields = {"Host": "a", "Content-Type": "application/json"} | {
        key.replace("_", "-"): value for key, value in headers.items()
    }
    fields |= {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
    return "".join([f"POST {path} HTTP/1.1\r\n", *(f"{key}: {value}\r\n" for key, value in fields.items()), "\r\n"]).encode()


def answer_to(server: Server, parts: Iterable[bytes]) -> tuple[int, bytes, float]:
    """Status, body and seconds of what comes back, however little of the parts the server wants to hear."""
    begin = time.perf_counter()
    with connect(server) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = b""
        with suppress(ConnectionResetError):  # below the application uvicorn gives no length and hangs up with bytes unread
            body = response.read()
    return response.status, body, time.perf_counter() - begin


def chunked(parts: Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        yield f"{len(part):x}\r\n".encode() + part + b"\r\n"
    yield b"0\r\n\r\n"


def peak(server: Server) -> float:
    """The most memory the server ever had, megabytes."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    return int(kilobytes) / 1024


def large_bodies() -> dict[str, tuple[Iterable[bytes], int]]:
    """Name -> what is sent, and the status it deserves."""
    spaces = [b" " * MEGABYTE] * 64
    bomb = gzip.compress(b" " * (64 * MEGABYTE))
    part = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
    parts = part * 100_000 + b"--x--\r\n"
    return {
        "64 MB, as announced": ([head(64 * MEGABYTE), *spaces], 413),
        "64 MB in chunks": ([head(), *chunked(spaces)], 413),
        "compressed 64 MB": ([head(len(bomb), Content_Encoding="gzip"), bomb], 415),
        "100,000 parts": ([head(len(parts), Content_Type="multipart/form-data; boundary=x"), parts], 415),
    }


@pytest.mark.parametrize("name", large_bodies())
def test_a_large_body_is_refused_fast_and_at_flat_memory(server: Server, name: str) -> None:
    before = peak(server)
    parts, expected = large_bodies()[name]
    status, body, seconds = answer_to(server, parts)
    assert status == expected, body
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert seconds < FAST_SECONDS
    assert peak(server) - before < FLAT_MEGABYTES


@pytest.mark.parametrize("fields", [{"x": "a" * MEGABYTE}, {f"x{i}": "a" * 50 for i in range(20_000)}], ids=["one", "many"])
def test_huge_headers_are_refused_fast_and_at_flat_memory(server: Server, fields: dict[str, str]) -> None:
    before = peak(server)
    status, _, seconds = answer_to(server, [head(2, **fields), b"{}"])
    assert status in (400, 431)
    assert seconds < FAST_SECONDS
    assert peak(server) - before < FLAT_MEGABYTES


def test_a_thousand_idle_and_slow_connections_leave_healthy_callers_alone(server: Server) -> None:
    begun = (b"", b"POST ", head(100), head(100) + b'{"prompt": ', head() + b"5\r\n{")
    with ExitStack() as stack, httpx.Client() as healthy:
        for number in range(CROWD):
            connection = stack.enter_context(connect(server))
            connection.sendall(begun[number % len(begun)])
        for seed in range(20):
            begin = time.perf_counter()
            assert healthy.post(server.url + PATH, json=BODY | {"seed": seed}).status_code == 200
            assert time.perf_counter() - begin < FAST_SECONDS


@pytest.mark.parametrize("cut", [b"5\r\n{", b'5\r\n{"a"\r\n', b"zz\r\n", b'5\r\n{"a":}}}\r\n', b"-1\r\n"])
def test_a_body_that_is_cut_short_or_garbled_is_nobody_s_error(server: Server, cut: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(head() + cut)
        connection.shutdown(socket.SHUT_WR)
        said = connection.recv(65536)
    assert not said or said.startswith(b"HTTP/1.1 4")
    assert "Traceback" not in server.log.read_text()


def test_a_caller_who_leaves_in_the_middle_of_a_body_is_nobody_s_error(server: Server) -> None:
    for _ in range(20):
        with connect(server) as connection:
            connection.sendall(head(1000) + b'{"prompt": "a')
    time.sleep(0.2)
    assert "Traceback" not in server.log.read_text()


def test_junk_behind_a_request_ends_the_connection_after_its_answer(server: Server) -> None:
    body = json.dumps(BODY).encode()
    with connect(server) as connection:
        connection.sendall(head(len(body)) + body + b"\x00\xffjunk\r\n\r\n" * 10)
        said = b""
        while received := connection.recv(65536):
            said += received
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "request_",
    [
        head(5) + head(5),
        head(5).replace(b"Content-Length", b"Content-Length: 7\r\nContent-Length"),
        head(5).replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"),
        b"GET / HTTP/x\r\n\r\n",
        b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        bytes(range(256)) * 400,
    ],
    ids=["as body", "two lengths", "length and chunks", "HTTP/x", "long path", "TLS", "HTTP/2", "noise"],
)
def test_what_is_no_request_is_refused(server: Server, request_: bytes) -> None:
    with connect(server) as connection:
        connection.settimeout(FAST_SECONDS)
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            said = connection.recv(65536)
            assert not said or re.match(rb"HTTP/1\.[01] 4\d\d ", said), said


# --- values ---------------------------------------------------------------------------------------------------------------


def post(server: Server, body: bytes) -> httpx.Response:
    return httpx.post(server.url + PATH, content=body, headers={"Content-Type": "application/json"}, timeout=30)


PROMPTS = {
    "empty": '""',
    "blank": '" \\n\\t"',
    "too long": json.dumps("a" * 101),
    "far too long": json.dumps("a" * 900_000),
    "NUL": '"a\\u0000b"',
    "lone surrogate": '"a\\ud800b"',
    "lone low surrogate": '"\\udc00"',
    "right to left": '"\\u05d0\\u202e\\u202d b"',
    "emoji": '"\U0001f534\u200d\U0001f7e6"',
    "control characters": '"\\u001b[31m\\u0007\\u0085\\u2028"',
    "log injection": '"x\\r\\nINJECTED \\u0085INJECTED\\u2028INJECTED"',
    "format strings": '"%s%n {0.__class__} ${jndi:ldap://a}"',
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_a_strange_prompt_is_a_picture_or_a_400(server: Server, prompt: str) -> None:
    answer = post(server, b'{"seed": 7, "prompt": %b}' % prompt.encode())
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] in ("prompt", None)


VALUES = {
    "size": [
        "0",
        '"0x0"',
        '"-64x64"',
        '"1000000000x1000000000"',
        '"64x64x2"',
        '"64X64"',
        '" 64x64"',
        '"\u0666\u0664x64"',
        "[64, 64]",
    ],
    "num_inference_steps": ["0", "5", "-1", "1000000000", "2.5", "1e3", "4.0", "true", '"4"', "[4]", "{}"],
    "steps": ["0", "5", "2.5", "false", '"4"'],
    "seed": ["-1", str(2**64), "1e3", "7.0", "true", '"7"', "9" * 4000, "-0.5", "[]"],
    "n": ["0", "11", "1000", "-1", "1.5", "true", '"1"'],
    "image_index": ["-1", str(2**32), "0.5", "true"],
    "prompt": ["0", "true", "[]", "{}", '["a"]', "null"],
    "model": ["0", "[]", "true"],
    "quality": ['"hd"', "4", '""', '"LOW"'],
    "output_format": ['"gif"', '"PNG"', "1", '"image/png"'],
    "output_compression": ["-1", "101", "50.5", '"50"'],
    "response_format": ['"file"', "1"],
    "stream": ['"true"', "1", "[]"],
    "partial_images": ["-1", "4", "1.5", '"1"', "1"],
    "guidance_scale": ["7.5", '"1"', "true", "1e400", "-1"],
    "background": ['"transparent"', "0"],
    "embed_prompt": ['"yes"', "1"],
    "user": ["1", json.dumps("u" * 257)],
    "__class__": ["1"],
    "\\u0000": ["1"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in VALUES.items() for value in values])
def test_an_illegal_value_is_a_400_that_names_its_field(server: Server, field: str, value: str) -> None:
    rest = "" if field == "prompt" else '"prompt": "a", '
    answer = post(server, f'{{{rest}"{field}": {value}}}'.encode())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == json.loads(f'"{field}"')
    assert "\n" not in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["guidance_scale", "seed", "num_inference_steps"])
def test_what_json_has_no_number_for_is_refused(server: Server, field: str, number: str) -> None:
    answer = post(server, f'{{"prompt": "a", "{field}": {number}}}'.encode())
    assert answer.status_code == 400
    assert number in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["prompt", "seed", "num_inference_steps"])
def test_a_field_given_twice_is_refused_by_name(server: Server, field: str) -> None:
    answer = post(server, f'{{"prompt": "a", "{field}": 1, "{field}": 2}}'.encode())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("depth", [500, 5_000, 400_000])
@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_a_400(server: Server, depth: int, opened: str, closed: str) -> None:
    deep = (opened * depth + "1" + closed * depth)[: MEGABYTE - 100]
    assert post(server, f'{{"prompt": {deep}}}'.encode()).status_code == 400


# --- what errors and logs say ---------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="/.\\"), max_size=20).filter(
    lambda text: not INSIDE.search(text)
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=5
)
FIELDS = st.sampled_from([*(field for field in VALUES if field.isascii() and field.isidentifier())]) | WORDS


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.dictionaries(FIELDS, JSON, max_size=5) | JSON,
    path=st.just(PATH) | WORDS.map(lambda name: f"/v1/models/{quote(name)}"),
)
def test_no_error_shows_the_inside(server: Server, body: Any, path: str) -> None:
    content = json.dumps(body).encode()
    answer = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=30)
    assert answer.status_code < 500
    if answer.status_code >= 400:
        message = answer.json()["error"]["message"].replace(path, "")
        assert not INSIDE.search(message), message
        assert "\n" not in message


def test_nothing_a_caller_sends_begins_a_line_of_the_log(server: Server) -> None:
    injected = "x\r\nINJECTED\nINJECTED"
    httpx.post(server.url + PATH, json={"prompt": injected, "user": injected})
    httpx.post(server.url + PATH, json={"prompt": "a", "model": injected, injected: 1})
    httpx.get(f"{server.url}/{quote(injected)}")
    httpx.get(f"{server.url}/v1/models/{quote(injected)}")
    answer_to(server, [head(2, X_Request_Id="a\x85INJECTED\x0bINJECTED"), b"{}"])
    answer_to(server, [b"GET /\x0bINJECTED HTTP/1.1\r\nHost: a\r\n\r\n"])
    assert not [line for line in server.log.read_text().splitlines() if line.startswith("INJECTED")]
    assert "red circle" not in server.log.read_text()

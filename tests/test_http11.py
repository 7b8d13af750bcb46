"""HTTP/1.1 as we speak it, over real sockets: heads are bounded, and what is no HTTP is told so in the one envelope."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from server.gateway.http11 import MOST_HEAD_BYTES, Http11

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body, a little later."""
    body = await Request(scope, receive).body()
    await asyncio.sleep(0.01)
    await PlainTextResponse(body)(scope, receive, send)


def talk(conversation: Talk) -> None:
    """Holds a conversation with a server that speaks Http11."""

    async def run() -> None:
        server = uvicorn.Server(uvicorn.Config(echo, port=0, http=Http11, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
        try:
            await asyncio.wait_for(conversation(reader, writer), 20)
        finally:
            writer.close()
            server.should_exit = True
            await serving

    asyncio.run(run())


def refused(said: bytes) -> None:
    """Asserts that an answer is the envelope with status 400, and an id."""
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert re.search(rb"\r\nx-request-id: req_[0-9a-f]{32}\r\n", head)
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "malformed_request")


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        HEAD + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
    ],
    ids=["HTTP/x", "TLS", "two lengths", "length and chunks", "a chunk without a length", "a tunnel"],
)
def test_what_is_no_http_is_refused_in_the_envelope_of_every_other_error(junk: bytes) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(junk)
        refused(await reader.read())

    talk(conversation)


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (HEAD, b"x: " + b"a" * 1000 + b"\r\n"),
        (HEAD + b"x: ", b"a" * 1000),
        (b"GET /", b"a" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"x: " + b"a" * 1000 + b"\r\n"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a" * 1000),
    ],
    ids=["headers", "one header", "path", "trailers", "chunk extension"],
)
def test_nothing_but_a_body_may_go_on_for_ever(begin: bytes, piece: bytes) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer, sent = asyncio.create_task(reader.read()), 0
        writer.write(begin)
        while not answer.done() and sent < 10 * MOST_HEAD_BYTES:
            writer.write(piece)
            sent += len(piece)
            await asyncio.sleep(0.0005)  # one by one
        assert MOST_HEAD_BYTES / 2 < sent < 2 * MOST_HEAD_BYTES
        with suppress(ConnectionResetError):  # the answer is lost when the next piece comes before it is read
            refused(await answer)

    talk(conversation)


def test_a_head_within_the_bound_and_a_body_beyond_it_are_taken() -> None:
    body = b"b" * (4 * MOST_HEAD_BYTES)
    long = b"x: " + b"a" * (MOST_HEAD_BYTES - 1000) + b"\r\n"

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(HEAD + long + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            assert await reader.readexactly(len(body)) == body

    talk(conversation)


def test_a_request_is_answered_before_the_junk_behind_it_ends_the_connection() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Content-Length: 5\r\n\r\nhello" + b"\x00\xffjunk\r\n\r\n")
        said = await reader.read()
        assert said.startswith(b"HTTP/1.1 200 ")
        assert said.endswith(b"hello")

    talk(conversation)


@pytest.mark.parametrize("pieces", [1, 1000], ids=["at once", "byte by byte"])
def test_an_offer_of_another_protocol_is_declined_and_the_request_served(pieces: int) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    whole = HEAD + offer + b"Content-Length: 5\r\n\r\nhello" + HEAD + b"Content-Length: 5\r\n\r\nagain"
    size = -(-len(whole) // pieces)

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(whole), size):
            writer.write(whole[start : start + size])
            await asyncio.sleep(0)
        for expected in (b"hello", b"again"):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            assert await reader.readexactly(5) == expected

    talk(conversation)

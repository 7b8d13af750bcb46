"""HTTP/1.1 over httptools in place of uvicorn's default parser, with which a refusal costs half as much again.

What httptools lacks is added here: bounds on what comes before a body, and requests that offer another protocol (Java's client
and `curl --http2` offer h2c), whose body it would take for that protocol. What is no HTTP is answered in the envelope of every
other error.
"""

import json
import uuid
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.gateway.errors import ApiError

MOST_HEAD_BYTES = 64 << 10  # of the request line and the headers; also of anything else that is not a body
NOT_HTTP = ApiError(
    400, f"the request is not HTTP/1.1, or its head is longer than {MOST_HEAD_BYTES} bytes", code="malformed_request"
)


class Http11(HttpToolsProtocol):
    """One connection; see uvicorn.Config's `http`."""

    incomplete = 0  # bytes since anything of the request was complete
    head = 0  # bytes of its complete headers and trailers

    def __init__(self, *configuration: Any, **named: Any) -> None:
        super().__init__(*configuration, **named)
        self.parser = Parser(self)

    def data_received(self, data: bytes) -> None:
        self.incomplete += len(data)
        super().data_received(data)
        if self.incomplete > MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("")

    # --- what the parser finds; whatever is raised here ends in a 400 ---------------------------------------------------------

    def on_message_begin(self) -> None:
        self.incomplete = self.head = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.incomplete, self.head = 0, self.head + len(name) + len(value)
        if len(self.url) + self.head > MOST_HEAD_BYTES:
            raise ValueError("the head is too long")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.incomplete = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.incomplete = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def head_without_offer(self) -> bytes:
        """The head of the request as it came, but for its offer of another protocol. Raises ValueError when it has none."""
        kept = [(name, value) for name, value in self.headers if name != b"upgrade"]
        if len(kept) == len(self.headers):
            raise ValueError("a tunnel is asked for")
        lines = b"".join(b"%s: %s\r\n" % field for field in kept)
        version = self.parser.get_http_version().encode()
        return b"%s %s HTTP/%s\r\n%s\r\n" % (self.parser.get_method(), self.url, version, lines)

    def send_400_response(self, msg: str) -> None:
        """Ends the connection, but not before a complete request has its answer."""
        if self.cycle and not self.cycle.response_complete and not self.cycle.more_body:
            self.cycle.keep_alive = False
            return self.flow.pause_reading()
        body = json.dumps(NOT_HTTP.envelope()).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        head += f"x-request-id: req_{uuid.uuid4().hex}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


class Parser(httptools.HttpRequestParser):
    """Takes up no offer of another protocol."""

    def __init__(self, protocol: Http11) -> None:
        super().__init__(protocol)
        self.protocol = protocol

    def feed_data(self, data: Any) -> None:
        """data: bytes. Raises HttpParserError."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            try:
                head = self.protocol.head_without_offer()
            except ValueError as error:
                raise httptools.HttpParserError(str(error)) from None
            super().feed_data(head + data[offer.args[0] :])

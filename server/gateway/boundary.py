"""The layer around all routes: gives every request an id, bounds its body, and turns what nobody caught into a plain 500."""

import logging
import re
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.gateway.errors import ApiError, internal_error

logger = logging.getLogger("fewstep")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Boundary:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = scope["request_id"] = requested_id(scope) or f"req_{uuid.uuid4().hex}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, bounded(receive, self.max_body_bytes), send_with_id)
        except Exception as error:
            answer = error if isinstance(error, ApiError) else internal_error()
            if isinstance(error, ClientDisconnect):
                answer = ApiError(499, "the caller closed the connection", code="cancelled")
            elif answer is not error:
                logger.exception("request failed", extra={"fields": {"id": request_id}})
            if started:
                raise
            await answer.response()(scope, receive, send_with_id)


def bounded(receive: Receive, most: int) -> Receive:
    """`receive`, refusing with 413 once the body has more than `most` bytes."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > most:
            said = f"the body is larger than {most} bytes"
            raise ApiError(413, said, code="body_too_large", headers={"Connection": "close"})
        return message

    return counted


def requested_id(scope: Scope) -> str | None:
    """The caller's own x-request-id, when it is fit for a log line."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else None

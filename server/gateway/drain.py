"""The end of a server: readiness goes first, then new requests are refused, then those under way are finished. Jobs are left to
the next server at once.

A second signal ends everything at once.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from server.gateway.errors import ApiError

NOTICE_SECONDS = 1.0  # that load balancers have to see that we are not ready, while we still answer them
LAST_SECONDS = 2  # that uvicorn has to close connections after that
RETRY_AFTER = "2"


class Drain:
    """Whether this server is ending, and how many requests it has still to answer."""

    def __init__(self) -> None:
        self.draining = False
        self.under_way = 0


class Gate:
    """ASGI middleware: counts the requests under way on the API, and takes no more of them while draining."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app, self.drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError 503."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        if self.drain.draining:
            said = "the server is shutting down; send the request again"
            raise ApiError(503, said, code="draining", headers={"Retry-After": RETRY_AFTER, "Connection": "close"})
        self.drain.under_way += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.drain.under_way -= 1


class DrainingServer(uvicorn.Server):
    """uvicorn, which by itself closes its socket at the first signal, before anybody could know."""

    def __init__(
        self, config: uvicorn.Config, drain: Drain, grace_seconds: float, leave: Callable[[], None], kill: Callable[[], None]
    ) -> None:
        """leave: called once, on the event loop, when draining begins; kill: ends at once what would outlive this process."""
        config.timeout_graceful_shutdown = LAST_SECONDS
        super().__init__(config)
        self.drain, self.grace_seconds, self.leave, self.kill = drain, grace_seconds, leave, kill
        self.notice_seconds = 0.0
        self.asked, self.left = 0.0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)  # before uvicorn begins, and after it has ended

    def announced(self) -> None:
        """From now on somebody may count on us, and is told when that ends."""
        self.notice_seconds = NOTICE_SECONDS

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's own would also raise the signal once more in the end, and with it end us before the backend is."""
        if self.drain.draining:
            self.kill()
            os._exit(128 + sig)
        self.drain.draining, self.asked = True, time.monotonic()
        if sig == signal.SIGINT:
            self.notice_seconds = 0.0  # somebody at a keyboard, who waits

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second whether to end."""
        if self.drain.draining:
            if not self.left:
                self.left = True
                self.leave()
            waited = time.monotonic() - self.asked
            idle = not self.drain.under_way and waited >= self.notice_seconds
            self.should_exit = self.should_exit or idle or waited > self.grace_seconds
        return await super().on_tick(counter)

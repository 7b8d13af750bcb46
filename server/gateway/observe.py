"""The layer around all others: one count, one log line and, if wanted, one trace for every request, whatever became of it."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.gateway.backend import TRACEPARENT
from server.gateway.metrics import bounded
from server.gateway.record import CURRENT, Record
from server.gateway.traceparent import traceparent

logger = logging.getLogger("fewstep.request")

IMAGES = "/v1/images/generations"
GENERATIONS = (IMAGES, "/v1/videos/sync")  # a job is not made while its request is served
PROBES = ("/livez", "/readyz", "/health", "/metrics")  # asked all day by machines: their successes are no news


class Observed:
    """ASGI middleware. Its record of the request is scope["fewstep_record"], and record.current() in all its tasks."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        record = scope["fewstep_record"] = Record()
        tracing, span = scope["app"].state.tracing, None
        if tracing and is_generation(scope):
            span = tracing.begin(scope["headers"])
        CURRENT.set(record)
        TRACEPARENT.set(tracing.traceparent(span) if span else traceparent(scope["headers"]))
        try:
            await self.app(scope, *watched(record, receive, send))
        except BaseException as error:
            record.error = error
            raise
        finally:
            report(scope, record)
            if span:
                tracing.end(span, record, route_template(scope))


def watched(record: Record, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """`receive` and `send` that tell `record` the status, and whether the caller went away before the last byte."""
    complete = False

    async def watched_receive() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" and not complete:
            record.gone = True
        return message

    async def watched_send(message: Message) -> None:
        nonlocal complete
        if message["type"] == "http.response.start":
            record.status = message["status"]
        complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await send(message)

    return watched_receive, watched_send


def report(scope: Scope, record: Record) -> None:
    """Counts and logs a request that is over."""
    state, seconds = scope["app"].state, (time.perf_counter_ns() - record.begin) / 1e9
    if is_generation(scope):
        state.metrics.count(record, state.backend.students, seconds)
    if scope["path"].startswith("/v1/"):
        state.metrics.count_reject(record)
    logger.log(level(scope, record), "request", extra={"fields": log_fields(scope, record, seconds)})


def log_fields(scope: Scope, record: Record, seconds: float) -> dict[str, Any]:
    """What a log line says. Nothing that a caller has written goes in unchecked: neither path, nor model, nor prompt."""
    model, nfe = bounded(record, scope["app"].state.backend.students)
    generation = {"model": model, "nfe": int(nfe) if nfe else None} if is_generation(scope) else {}
    queue = {} if record.queue_ms is None else {"queue_ms": round(record.queue_ms, 3)}
    return {
        "id": scope.get("request_id"),
        "method": scope["method"],
        "route": route_template(scope),
        **generation,
        "status": record.outcome if record.outcome == "cancelled" else int(record.outcome),
        "code": record.code,
        "ms": round(seconds * 1000, 3),
        **queue,
        "key": scope.get("fewstep_key", "anonymous"),
    }


def level(scope: Scope, record: Record) -> int:
    if record.outcome.startswith("5"):
        return logging.WARNING
    return logging.DEBUG if scope["path"] in PROBES else logging.INFO


def is_generation(scope: Scope) -> bool:
    """Whether a request waits for images or a video; known before any route has seen it, so that early refusals count too."""
    return scope["method"] == "POST" and scope["path"] in GENERATIONS


def route_template(scope: Scope) -> str:
    """The path as the route was declared; its parameters are the caller's own words."""
    if is_generation(scope):
        return str(scope["path"])
    return getattr(scope.get("route"), "path", None) or "unmatched"

"""Every failure as OpenAI's envelope: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from server.gateway.backend import (
    BackendError,
    BackendTimeout,
    BackendUnavailable,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    NumericalError,
    ShuttingDown,
)
from server.gateway.record import current
from server.jobs.errors import IdempotencyConflict, JobsError, NoSuchFile, NoSuchJob, StoreUnavailable, Unavailable

logger = logging.getLogger("fewstep")

SHOWN = 80  # characters of a refused value that are sent back
FIELD_NAMES = {"nfe": "num_inference_steps"}  # the engine's word -> the API's


class ApiError(Exception):
    """An answer that is an error. headers go out with it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def envelope(self) -> dict[str, Any]:
        """The body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        current().failed(self.status, self.code)
        return JSONResponse(self.envelope(), self.status, self.headers)


def invalid(message: str, param: str | None, code: str | None = "invalid_value") -> ApiError:
    """400: the value of `param` is not legal."""
    return ApiError(400, message, param, code)


def from_validation(error: ValidationError) -> ApiError:
    """The first complaint of pydantic as a 400 that names the field, the value and what is legal."""
    first = error.errors(include_url=False)[0]
    where = [str(part) for part in first["loc"]]
    param = where[0] if where else None
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown field {show(param)}; see /docs for the legal ones", param, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"{param} is required", param, "missing_required_parameter")
    said = first["msg"].removeprefix("Value error, ")
    return invalid(f"{param or 'the body'}: {said}, got {show_unless_prompt(param, first['input'])}", param)


def show_unless_prompt(param: str | None, value: Any) -> str:
    """What was received for `param`, None for the whole body; only JSON's name for its type where it may hold a prompt."""
    if param not in (None, "prompt", "negative_prompt"):
        return show(value)
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def show(value: Any) -> str:
    """A received value, short and on one line."""
    text = ascii(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def from_backend(error: Exception) -> ApiError:
    """What the backend raised, as an answer that shows nothing of the inside."""
    if isinstance(error, InvalidRequest):
        return invalid(str(error), FIELD_NAMES.get(error.param or "", error.param))
    if isinstance(error, NumericalError):
        return ApiError(500, "the student's output was not finite, so no image was made", code="numerical_error")
    if isinstance(error, BackendUnavailable):
        return ApiError(503, str(error), code="backend_unavailable", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, ShuttingDown):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "2"})
    if isinstance(error, BackendTimeout | DeadlineExceeded):
        return ApiError(504, str(error), code="deadline_exceeded")
    return from_jobs(error) if isinstance(error, JobsError) else internal_error()


def from_jobs(error: JobsError) -> ApiError:
    """What the store of jobs or their files raised; messages of what is unavailable tell where it lies, and stay in the log."""
    if isinstance(error, Unavailable):
        part = "database of jobs" if isinstance(error, StoreUnavailable) else "storage of videos"
        logger.warning("%s: %s", type(error).__name__, error)
        said = f"the {part} is not available now; nothing was changed, try again in {error.retry_after} s"
        code = "store_unavailable" if isinstance(error, StoreUnavailable) else "storage_unavailable"
        return ApiError(503, said, code=code, headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, NoSuchJob):
        return ApiError(404, "there is no such video, or it is not this key's", "video_id", "video_not_found")
    if isinstance(error, NoSuchFile):
        return ApiError(410, "the video is no longer kept; the same request with its seed makes it again", code="expired")
    if isinstance(error, IdempotencyConflict):
        said = "this Idempotency-Key was sent with another body before; use a new key for a new video"
        return ApiError(409, said, "idempotency-key", "idempotency_conflict", {"x-should-retry": "false"})
    return internal_error()


def to_api_error(error: Exception, request_id: str | None = None) -> ApiError:
    """Any failure as an answer; what is our fault goes to the log."""
    answer = error if isinstance(error, ApiError) else from_backend(error)
    if answer.status == 500:
        logger.error("%s: %s", type(error).__name__, error, extra={"fields": {"id": request_id}})
    return answer


def internal_error() -> ApiError:
    """500: our fault; what happened is in the log, under the request's id."""
    return ApiError(500, "internal error; name the x-request-id of this answer when you report it", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Makes every error of `app` an envelope. What no handler knows is answered in boundary.py.

    The handlers are coroutines since Starlette runs others on threads, which under a flood of errors is most of their cost.
    """
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    for kind in (BackendError, EngineError, JobsError):
        app.add_exception_handler(kind, on_backend_error)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def on_backend_error(request: Request, error: Exception) -> JSONResponse:
    return to_api_error(error, request.scope.get("request_id")).response()


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    path = show(request.url.path)
    if error.status_code == 404:
        return ApiError(404, f"no such path: {path}; see /docs", code="not_found").response()
    if error.status_code == 405:
        allowed = ", ".join(sorted(methods(request)))
        said = f"{request.method} is not allowed on {path}, only {allowed}"
        return ApiError(405, said, code="method_not_allowed", headers={"Allow": allowed}).response()
    return ApiError(error.status_code, str(error.detail), headers=error.headers).response()


def methods(request: Request) -> set[str]:
    """What may be done with a path: the router names the methods of the first route that has it, and there may be several."""
    found: list[Route] = []
    waiting: list[Any] = list(request.app.routes)
    while waiting:
        route = waiting.pop()
        waiting += getattr(getattr(route, "original_router", route), "routes", None) or []
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found.append(route)
    own = [route for route in found if not route.param_convertors]  # what is said of a path by name goes before a pattern
    return {method for route in own or found for method in route.methods or ()} or {"GET", "HEAD"}  # a folder of files

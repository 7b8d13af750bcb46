"""A JSON body, read strictly: what two parsers could read differently is refused."""

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from server.gateway.errors import ApiError, from_validation, invalid, show

Schema = TypeVar("Schema", bound=BaseModel)
BODY_SECONDS = 30.0  # that a caller may take to send it


async def read_json(request: Request, schema: type[Schema]) -> Schema:
    """The body as `schema`. Raises ApiError 400, 408, 415, or 499 where the caller leaves before its end."""
    kind = kind_of(request)
    if kind != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, got {show(kind)}", code="unsupported_media_type")
    return checked(schema, parse(await read_body(request)))


def kind_of(request: Request) -> str:
    """The type of the body, without its parameters. Raises ApiError 400 where two are named: others might read the other."""
    named = request.headers.getlist("content-type")
    if len(named) > 1:
        raise invalid(f"Content-Type is given {len(named)} times", "content-type", "malformed_body")
    return "".join(named).partition(";")[0].strip().lower()


async def read_body(request: Request) -> bytes:
    """All of it, as it was sent. Raises ApiError 408, 415 or 499."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "Content-Encoding must be absent", code="unsupported_media_type")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.body()
    except TimeoutError:
        said = f"the body did not come within {BODY_SECONDS:g} s"
        raise ApiError(408, said, code="body_timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(499, "the caller closed the connection in the middle of the body", code="cancelled") from None


def checked(schema: type[Schema], value: Any) -> Schema:
    """Raises ApiError 400 that names the field."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise from_validation(error) from None


def parse(body: bytes) -> Any:
    """JSON by RFC 8259, without repeated keys. Raises ApiError 400."""
    try:
        return json.loads(body.decode(), object_pairs_hook=without_repeats, parse_constant=refuse_constant)
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8", None, "malformed_json") from None
    except RecursionError:
        raise invalid("the body is nested too deeply", None, "malformed_json") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}", None, "malformed_json") from None


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; raises ApiError 400 when a key comes twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise invalid(f"the field {show(key)} is given twice", key, "malformed_json")
        found[key] = value
    return found


def refuse_constant(name: str) -> NoReturn:
    """NaN and Infinity are not JSON."""
    raise invalid(f"{name} is not JSON", None, "malformed_json")

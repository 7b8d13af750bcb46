"""Bodies of multipart/form-data, and queries: fields whose text is what JSON would have written, and no files."""

import json
from collections.abc import Iterable
from typing import Any, TypeVar, get_args

from fastapi import Request
from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from server.gateway.body import checked, kind_of, read_body, read_json
from server.gateway.errors import ApiError, invalid, show

Schema = TypeVar("Schema", bound=BaseModel)
FORM = "multipart/form-data"
MOST_FIELDS = 64


async def read_json_or_form(request: Request, schema: type[Schema]) -> Schema:
    """The body as `schema`, by its Content-Type. Raises ApiError 400, 408, 415 or 499."""
    return await (read_form(request, schema) if kind_of(request) == FORM else read_json(request, schema))


async def read_form(request: Request, schema: type[Schema]) -> Schema:
    """A form as `schema`: a field of text as it stands, any other as JSON would have it."""
    return from_pairs(schema, await fields(request))


def read_query(request: Request, schema: type[Schema]) -> Schema:
    """The part of the address after the question mark, read as a form is. Raises ApiError 400."""
    return from_pairs(schema, request.query_params.multi_items())


def from_pairs(schema: type[Schema], pairs: Iterable[tuple[str, str | UploadFile]]) -> Schema:
    """Names and values as `schema`. Raises ApiError 400 that names the field."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if isinstance(value, UploadFile):
            raise invalid(f"the field {show(name)} is a file, and none are taken", name, "unsupported_value")
        if name in found:
            raise invalid(f"the field {show(name)} is given twice", name, "malformed_form")
        found[name] = meant(schema, name, value)
    return checked(schema, found)


async def fields(request: Request) -> list[tuple[str, str | UploadFile]]:
    """Name and value of each, in order. Raises ApiError 400, also where the body ends before the form does."""
    body = await read_body(request)
    try:
        body.decode()
    except UnicodeDecodeError:
        raise invalid("the form is not UTF-8; files are not taken", None, "malformed_form") from None
    form = Form(
        Headers({"content-type": without_charset(request)}), request.stream(), max_fields=MOST_FIELDS, max_files=MOST_FIELDS
    )
    try:
        found = await form.parse()
    except MultiPartException as error:
        raise invalid(
            f"the body is no form of up to {MOST_FIELDS} fields: {show(error.message)}", None, "malformed_form"
        ) from None
    if not form.complete:
        raise invalid("the form ends before its last boundary", None, "malformed_form")
    return found.multi_items()


class Form(MultiPartParser):
    """Starlette's parser, which takes a form without an end and leaves its last field out."""

    complete = False

    def on_end(self) -> None:
        self.complete = True


def without_charset(request: Request) -> str:
    """The Content-Type with the boundary alone. Raises ApiError 415 for any charset but UTF-8."""
    options = {name.lower(): value for name, value in parse_options_header(request.headers["content-type"])[1].items()}
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise ApiError(415, f"the charset of a form must be utf-8, got {show(charset)}", code="unsupported_media_type")
    if not options.get(b"boundary"):
        raise invalid("Content-Type: multipart/form-data lacks its boundary", "content-type", "malformed_form")
    return f'{FORM}; boundary="{options[b"boundary"].decode("latin-1")}"'


def meant(schema: type[BaseModel], name: str, text: str) -> Any:
    """A field's text as JSON would have it: of a number its value. What is none stays text, and is refused by the schema."""
    field = schema.model_fields.get(name)
    if field is None or str in get_args(field.annotation) or field.annotation is str:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if type(value) in (int, float) else text

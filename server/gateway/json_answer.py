"""JSON with pictures in it: base64 and serialising by libraries that are tens of times as fast as Python's own."""

from typing import Any

import orjson
import pybase64
from fastapi.responses import JSONResponse


class PictureResponse(JSONResponse):
    """A JSON answer that may hold megabytes of base64."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(document: Any) -> bytes:
    """UTF-8 on one line. Raises TypeError for what is no JSON, lone surrogates and keys other than str among it; a float that
    is not finite is sent as null."""
    return orjson.dumps(document)


def to_base64(content: bytes) -> str:
    """Standard base64, padded, as one ASCII string."""
    return pybase64.b64encode_as_string(content)

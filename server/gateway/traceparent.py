"""The W3C trace context of a request: accepted when it is well formed, and passed on."""

import re
from collections.abc import Iterable

HEADER = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def traceparent(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The value of a single, well-formed traceparent header."""
    given = [value for name, value in headers if name == b"traceparent"]
    return given[0].decode() if len(given) == 1 and HEADER.fullmatch(given[0]) else None

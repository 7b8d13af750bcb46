"""A part of a file, as HTTP asks for it (RFC 9110, section 14): players read an mp4 piece by piece."""

import re
from collections.abc import Mapping

from server.gateway.errors import ApiError, show

ONE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.I)


def wanted(headers: Mapping[str, str], size: int, etag: str) -> range | None:
    """Which of `size` bytes are asked for; None for all of them, and for what the RFC lets a server answer so: several ranges,
    other units, a Range that cannot be read, one for another version of the file (If-Range).

    headers: by lower-case name. Raises ApiError 416 for a range without a byte of the file."""
    asked = ONE_RANGE.fullmatch(headers.get("range", "").strip())
    if asked is None or headers.get("if-range", etag) != etag:
        return None
    first, last = asked.groups()
    if (first and last and int(last) < int(first)) or not (first or last):
        return None
    begin = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if begin >= end:
        raise unsatisfiable(asked[0], size)
    return range(begin, end)


def unsatisfiable(asked: str, size: int) -> ApiError:
    """416, which tells how long the file is."""
    said = f"the file has {size} bytes and none of them is in the range {show(asked)}"
    headers = {"Content-Range": f"bytes */{size}", "Cache-Control": "no-store"}
    return ApiError(416, said, "range", "range_not_satisfiable", headers)


def content_range(part: range, size: int) -> str:
    """The header that says which bytes a 206 holds."""
    return f"bytes {part.start}-{part.stop - 1}/{size}"


def listed(header: str, etag: str) -> bool:
    """Whether If-None-Match names a file, by the weak comparison."""
    given = {tag.strip().removeprefix("W/") for tag in header.split(",")}
    return bool(given & {etag, "*"})

"""Byte ranges as RFC 9110 has them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.errors import ApiError
from server.gateway.ranges import content_range, listed, wanted

TAG = '"abc"'


def part(asked: str, size: int = 1000, **more: str) -> range | None:
    return wanted({"range": asked} | {name.replace("_", "-"): value for name, value in more.items()}, size, TAG)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("bytes=0-0", range(0, 1)),
        ("bytes=0-499", range(0, 500)),
        ("bytes=500-", range(500, 1000)),
        ("bytes=-200", range(800, 1000)),
        ("bytes=-2000", range(0, 1000)),
        ("bytes=999-5000", range(999, 1000)),
        ("Bytes=1-2", range(1, 3)),
    ],
)
def test_a_range_names_its_bytes(asked: str, expected: range) -> None:
    assert part(asked) == expected


@pytest.mark.parametrize(
    "asked", ["", "bytes", "bytes=-", "bytes=5-4", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", "bytes= 0-1", "bytes=٠-1"]
)
def test_what_cannot_be_read_is_answered_with_the_whole_file(asked: str) -> None:
    assert part(asked) is None


@pytest.mark.parametrize("asked", ["bytes=1000-", "bytes=1000-2000", "bytes=-0"])
def test_a_range_without_a_byte_of_the_file_is_a_416_that_tells_its_size(asked: str) -> None:
    with pytest.raises(ApiError) as caught:
        part(asked)
    assert caught.value.status == 416
    assert caught.value.headers is not None
    assert caught.value.headers["Content-Range"] == "bytes */1000"


def test_no_range_of_an_empty_file_can_be_had() -> None:
    for asked in ("bytes=0-", "bytes=-5"):
        with pytest.raises(ApiError):
            part(asked, 0)


def test_if_range_asks_for_the_whole_of_another_version() -> None:
    assert part("bytes=0-1", if_range=TAG) == range(0, 2)
    for other in ('"old"', f"W/{TAG}", "Sat, 21 Nov 2026 00:00:00 GMT", ""):
        assert part("bytes=0-1", if_range=other) is None


@given(size=st.integers(1, 500), cuts=st.lists(st.integers(1, 499), max_size=8))
def test_pieces_make_up_the_file(size: int, cuts: list[int]) -> None:
    content, begins = bytes(index % 251 for index in range(size)), sorted({0, *(cut for cut in cuts if cut < size)})
    ends = [*begins[1:], size]
    pieces = [part(f"bytes={begin}-{end - 1}", size) for begin, end in zip(begins, ends, strict=True)]
    assert b"".join(content[piece.start : piece.stop] for piece in pieces if piece is not None) == content


def test_headers_say_what_is_sent() -> None:
    assert content_range(range(5, 10), 100) == "bytes 5-9/100"
    assert listed(f'"x", W/{TAG}', TAG)
    assert listed("*", TAG)
    assert not listed("", TAG)

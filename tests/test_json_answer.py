"""What is sent is JSON as Python's own library reads it."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.json_answer import PictureResponse, to_base64, to_json

TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.binary(max_size=4000))
def test_base64_is_python_s(content: bytes) -> None:
    assert to_base64(content) == base64.b64encode(content).decode()


@given(TREES)
def test_a_document_is_read_back_as_it_was_and_takes_one_line(document: Any) -> None:
    sent = to_json(document)
    assert json.loads(sent) == document
    assert b"\n" not in sent


@pytest.mark.parametrize("document", [{"a": object()}, {1: "a"}, "\ud800", {"a": b"bytes"}, 2**64])
def test_what_is_no_json_is_an_error_and_never_sent_as_something_else(document: Any) -> None:
    with pytest.raises(TypeError):
        to_json(document)


def test_a_number_that_is_not_finite_is_null() -> None:
    assert to_json([float("nan"), float("inf"), -float("inf")]) == b"[null,null,null]"


def test_an_answer_is_sent_as_json() -> None:
    answer = PictureResponse({"a": 2**64 - 1})
    assert answer.body == b'{"a":18446744073709551615}'
    assert answer.headers["content-type"] == "application/json"

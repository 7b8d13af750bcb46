"""Which weights an ONNX file keeps in another file, read off its bytes before any runtime sees them.

A runtime opens what such a tensor names: by an absolute path, above its folder, behind a link, from anywhere in the model. So
the one name that is legal here is the one that the manifest lists with its digest, and the one place is the graph's own
initialisers. The reader knows as much of ONNX's protobuf schema (onnx.proto) as it takes to find every tensor, and refuses
what parsers might read differently. It exists because serving does not install the onnx package.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from server.engine.errors import StudentError
from server.engine.student import Contents

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protobuf; 3 and 4, groups, are in no ONNX file
# message -> field number -> message, for every way from a model to a tensor.
SCHEMA: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
}
OWN_INITIALISER = ("Model", "Graph", "Tensor")
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of a tensor
DEEPEST = 32  # messages within messages
NUMBER = re.compile(rb"[0-9]{1,18}")


class External(NamedTuple):
    """A tensor's place in another file, in bytes."""

    location: str
    offset: int
    length: int


def check_external_data(file: str, contents: Contents, weights: str, size: int | None) -> None:
    """Raises StudentError unless everything that `file` keeps elsewhere is within the `size` bytes of the file `weights`.

    size: None where the manifest lists no such file; then nothing may be kept elsewhere.
    """
    found = 0
    for external in external_tensors(file, memoryview(contents), ("Model",)):
        found += 1
        if size is None:
            raise StudentError(f"{file} keeps weights in another file, which no digest covers; export the student again")
        if external.location != weights:
            raise StudentError(f"{file} keeps weights in {external.location!r:.80}, legal is {weights!r}; export it again")
        if external.offset + external.length > size:
            raise StudentError(
                f"{file} wants bytes {external.offset} to {external.offset + external.length} of {weights}, which has {size}; "
                "export the student again"
            )
    if size is not None and not found:
        raise StudentError(f"{file} keeps no weights in {weights}, which its manifest lists; export the student again")


def external_tensors(file: str, message: memoryview, path: tuple[str, ...]) -> Iterator[External]:
    """Every tensor below a message that is kept elsewhere; raises StudentError for one that is not an initialiser of the
    model's own graph. path: the messages that lead here."""
    if len(path) > DEEPEST:
        raise StudentError(f"{file} nests more than {DEEPEST} messages; export the student again")
    if path[-1] == "Tensor":
        if (external := external_of(file, message)) is not None:
            if path != OWN_INITIALISER:
                raise StudentError(
                    f"{file} keeps a tensor of its {' '.join(path[1:-1])} in another file; export it in one file"
                )
            yield external
        return
    below = SCHEMA[path[-1]]
    for number, wire_type, value in fields(file, message):
        if number in below:
            if wire_type != BYTES:
                raise unreadable(file)
            yield from external_tensors(file, value, (*path, below[number]))


def external_of(file: str, tensor: memoryview) -> External | None:
    """Where a TensorProto's values are, None for those within it. Raises StudentError for a place that is not plainly told."""
    entries: dict[bytes, bytes] = {}
    elsewhere = False
    for number, wire_type, value in fields(file, tensor):
        if number == DATA_LOCATION:
            if wire_type != VARINT:
                raise unreadable(file)
            elsewhere |= any(value)
        if number == EXTERNAL_DATA:
            if wire_type != BYTES:
                raise unreadable(file)
            key, word = entry_of(file, value)
            if key in entries:
                raise unreadable(file)
            entries[key] = word
    if not elsewhere and not entries:
        return None
    plain = set(entries) == {b"location", b"offset", b"length"}
    if not plain or not NUMBER.fullmatch(entries[b"offset"]) or not NUMBER.fullmatch(entries[b"length"]):
        raise StudentError(f"{file} does not tell location, offset and length of a weight, and those alone; export it again")
    return External(entries[b"location"].decode(errors="replace"), int(entries[b"offset"]), int(entries[b"length"]))


def entry_of(file: str, entry: memoryview) -> tuple[bytes, bytes]:
    """Key and value of a StringStringEntryProto."""
    told = list(fields(file, entry))
    if sorted((number, wire_type) for number, wire_type, _ in told) != [(1, BYTES), (2, BYTES)]:
        raise unreadable(file)
    words = {number: bytes(word) for number, _, word in told}
    return words[1], words[2]


def fields(file: str, message: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Number, wire type and bytes of every field of a protobuf message; raises StudentError for what is none."""
    at = 0
    while at < len(message):
        tag, at = varint(file, message, at)
        number, wire_type = tag >> 3, tag & 7
        begin = at
        if wire_type == VARINT:
            _, at = varint(file, message, at)
        elif wire_type == BYTES:
            length, begin = varint(file, message, at)
            at = begin + length
        elif wire_type in (FIXED32, FIXED64):
            at += 4 if wire_type == FIXED32 else 8
        else:
            raise unreadable(file)
        if at > len(message) or not 0 < number < 1 << 29:
            raise unreadable(file)
        yield number, wire_type, message[begin:at]


def varint(file: str, message: memoryview, at: int) -> tuple[int, int]:
    """A variable-length integer, and where it ends. Raises StudentError for one of more than 64 bits."""
    value = 0
    for index, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise unreadable(file)


def unreadable(file: str) -> StudentError:
    return StudentError(f"{file} is no ONNX file that can be read without doubt; export the student again")

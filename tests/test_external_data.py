"""Weights beside a graph's file are those that the manifest lists, byte for byte, or the student is refused before it runs."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from server.engine.engine import Engine
from server.engine.errors import StudentError
from server.engine.external_data import check_external_data
from server.engine.request import Request
from server.engine.student import open_student, weights_of
from tests.tiny_student import FILES, write_manifest

GRAPH = "vae_decoder.onnx"
WEIGHTS = weights_of(GRAPH)
SIZE = 64
REQUEST = Request("a red circle", 7, 0, 4, "64x64")


@pytest.fixture
def student(own_repository: Path) -> Path:
    """A student whose decoder keeps its kernel in a file of its own."""
    folder = own_repository / "tiny"
    graph = folder / "1" / GRAPH
    onnx.save_model(onnx.load(graph), graph, save_as_external_data=True, location=WEIGHTS, size_threshold=64)
    plain = onnx.load(graph, load_external_data=False)
    for tensor in plain.graph.initializer:
        keep_place_alone(tensor)
    graph.write_bytes(plain.SerializeToString())
    list_files(folder, (*FILES, WEIGHTS))
    return folder


def keep_place_alone(tensor: TensorProto) -> None:
    """Takes out what onnx says of a tensor beside location, offset and length."""
    kept = [entry for entry in tensor.external_data if entry.key in ("location", "offset", "length")]
    del tensor.external_data[:]
    tensor.external_data.extend(kept)


def list_files(folder: Path, names: tuple[str, ...]) -> None:
    """Writes the manifest anew with the digests of these files."""
    manifest = json.loads((folder / "1" / "student.json").read_text())
    digests = {name: hashlib.sha256((folder / "1" / name).read_bytes()).hexdigest() for name in names}
    write_manifest(folder, manifest | {"files": digests})


def refusal(folder: Path) -> str:
    """What opening the student says, in one line."""
    with pytest.raises(StudentError) as caught:
        Engine.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_in_a_file_of_their_own_make_the_same_pixels(student: Path, tiny_repository: Path) -> None:
    engine, one_file = Engine.open(student), Engine.open(tiny_repository / "tiny")
    assert np.array_equal(engine.run(REQUEST).image, one_file.run(REQUEST).image)
    assert WEIGHTS in engine.fingerprint_parts
    assert len(open_student(student).files[WEIGHTS]) == (student / "1" / WEIGHTS).stat().st_size


def test_the_bytes_that_run_are_those_that_were_verified(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Engine.open(student).run(REQUEST).image
    opened = open_student(student)
    decoy = student.parent / "decoy"
    decoy.mkdir()
    (decoy / WEIGHTS).write_bytes(bytes((student / "1" / WEIGHTS).stat().st_size))
    (student / "1" / WEIGHTS).rename(student / "gone")
    monkeypatch.chdir(decoy)  # where onnxruntime would look for the name
    assert np.array_equal(Engine.of(opened).run(REQUEST).image, before)


def alter(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def link(path: Path, kind: Callable[[Path, Path], None]) -> None:
    """Puts a link to the same bytes in the file's place."""
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    kind(elsewhere, path)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "altered": (alter, "sha256 is"),
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "symbolic link": (lambda path: link(path, os.symlink), "is a link"),
    "hard link": (lambda path: link(path, os.link), "hard link"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_of_weights_that_is_not_the_exported_one_is_refused(student: Path, name: str) -> None:
    damage, said = DAMAGE[name]
    damage(student / "1" / WEIGHTS)
    message = refusal(student)
    assert said in message
    assert str(student / "1" / WEIGHTS) in message


def test_a_file_of_weights_that_the_manifest_does_not_list_is_not_read(student: Path) -> None:
    list_files(student, FILES)
    assert "in another file, which no digest covers" in refusal(student)


def test_a_listed_file_that_no_graph_reads_is_refused(own_repository: Path) -> None:
    folder = own_repository / "tiny"
    (folder / "1" / WEIGHTS).write_bytes(b"0")
    list_files(folder, (*FILES, WEIGHTS))
    assert "keeps no weights in" in refusal(folder)


# --- what a graph may say of its weights --------------------------------------------------------------------------------------


def elsewhere(**changes: str | None) -> TensorProto:
    """A weight of SIZE bytes in the file of weights, but for some changes; None leaves an entry out."""
    tensor = numpy_helper.from_array(np.zeros(SIZE // 4, np.float32), "weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": WEIGHTS, "offset": "0", "length": str(SIZE)} | changes).items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def graph(initialisers: list[TensorProto] | None = None, nodes: list[Any] | None = None) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("weight", TensorProto.FLOAT, [SIZE // 4])
    return helper.make_graph(nodes or [], "graph", [], [output], initialisers or [])


def model(initialisers: list[TensorProto] | None = None, nodes: list[Any] | None = None) -> onnx.ModelProto:
    return helper.make_model(graph(initialisers, nodes))


def sparse(**changes: str | None) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.arange(SIZE // 4), "indices")
    return onnx.SparseTensorProto(values=elsewhere(**changes), indices=indices, dims=[SIZE])


def with_sparse() -> onnx.ModelProto:
    told = model()
    told.graph.sparse_initializer.append(sparse())
    return told


def with_function() -> onnx.ModelProto:
    told = model()
    node = helper.make_node("Constant", [], ["c"], value=elsewhere())
    told.functions.append(helper.make_function("own", "F", [], ["c"], [node], [helper.make_opsetid("", 18)]))
    return told


def with_training() -> onnx.ModelProto:
    told = model()
    told.training_info.append(onnx.TrainingInfoProto(initialization=graph([elsewhere()])))
    return told


def without_location_flag() -> TensorProto:
    """onnx calls it external by the flag alone; whoever goes by the entries must not read it either."""
    tensor = elsewhere(location="/etc/passwd")
    tensor.ClearField("data_location")
    return tensor


def flagged_by_a_large_number() -> bytes:
    """2^32 + 1 in data_location, which C++ parsers cut to 1."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "weight").SerializeToString() + b"\x70\x81\x80\x80\x80\x10"
    return in_graph(tensor)


def in_graph(tensor: bytes) -> bytes:
    """A model with one initialiser, given as bytes."""
    return field(7, field(5, tensor))


def field(number: int, value: bytes) -> bytes:
    assert len(value) < 1 << 14
    return bytes([number << 3 | 2, len(value) & 127 | 128, len(value) >> 7]) + value


def nested(depth: int) -> bytes:
    """Graphs within attributes within nodes."""
    inner = b""
    for _ in range(depth):
        inner = field(1, field(5, field(6, inner)))
    return field(7, inner)


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "absolute": (lambda: model([elsewhere(location="/etc/passwd")]), "'/etc/passwd', legal is"),
    "climbing": (lambda: model([elsewhere(location=f"../{WEIGHTS}")]), "legal is"),
    "below": (lambda: model([elsewhere(location=f"sub/{WEIGHTS}")]), "legal is"),
    "other spelling": (lambda: model([elsewhere(location=f"./{WEIGHTS}")]), "legal is"),
    "other file": (lambda: model([elsewhere(location="student.json")]), "legal is"),
    "address in memory": (lambda: model([elsewhere(location="*/_ORT_MEM_ADDR_/*")]), "legal is"),
    "second of two": (lambda: model([elsewhere(), elsewhere(location="student.json")]), "legal is"),
    "past the end": (lambda: model([elsewhere(offset="4")]), f"wants bytes 4 to {SIZE + 4}"),
    "longer than the file": (lambda: model([elsewhere(length="65")]), "wants bytes 0 to 65"),
    "negative offset": (lambda: model([elsewhere(offset="-4")]), "does not tell location, offset and length"),
    "offset in words": (lambda: model([elsewhere(offset="0x0")]), "does not tell"),
    "huge offset": (lambda: model([elsewhere(offset="9" * 19)]), "does not tell"),
    "no offset": (lambda: model([elsewhere(offset=None)]), "does not tell"),
    "no length": (lambda: model([elsewhere(length=None)]), "does not tell"),
    "no location": (lambda: model([elsewhere(location=None)]), "does not tell"),
    "more entries": (lambda: model([elsewhere(basepath="/")]), "does not tell"),
    "entries without the flag": (lambda: model([without_location_flag()]), "legal is"),
    "flag without entries": (flagged_by_a_large_number, "does not tell"),
    "attribute": (lambda: model(nodes=[helper.make_node("Constant", [], ["c"], value=elsewhere())]), "Graph Node Attribute"),
    "attribute's list": (lambda: model(nodes=[helper.make_node("F", [], ["c"], values=[elsewhere()])]), "Node Attribute"),
    "subgraph": (lambda: model(nodes=[helper.make_node("F", [], ["c"], body=graph([elsewhere()]))]), "Attribute Graph"),
    "sparse": (with_sparse, "Graph SparseTensor"),
    "sparse attribute": (lambda: model(nodes=[helper.make_node("F", [], ["c"], sparse_value=sparse())]), "SparseTensor"),
    "function": (with_function, "Function Node Attribute"),
    "training": (with_training, "Training Graph"),
    "twice the same entry": (lambda: twice_told(elsewhere()), "read without doubt"),
    "cut short": (lambda: model([elsewhere()]).SerializeToString()[:-3], "read without doubt"),
    "a group": (lambda: b"\x3b\x3c", "read without doubt"),
    "graph as a number": (lambda: b"\x38\x01", "read without doubt"),
    "tag of more than 32 bits": (lambda: b"\xba\x80\x80\x80\x10\x00", "read without doubt"),
    "endless number": (lambda: b"\x08" + b"\xff" * 12, "read without doubt"),
    "too deep": (lambda: nested(20), "nests more than"),
}


def twice_told(tensor: TensorProto) -> onnx.ModelProto:
    tensor.external_data.add(key="location", value="/etc/passwd")
    return model([tensor])


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_reaches_beyond_its_file_of_weights_is_refused(name: str) -> None:
    made, said = REFUSED[name]
    built = made()
    contents = built if isinstance(built, bytes) else built.SerializeToString()
    with pytest.raises(StudentError) as caught:
        check_external_data(GRAPH, contents, WEIGHTS, SIZE)
    assert said in str(caught.value)
    assert GRAPH in str(caught.value)


def test_a_graph_within_its_file_of_weights_is_accepted_and_one_without_weights_elsewhere_too() -> None:
    check_external_data(GRAPH, model([elsewhere()]).SerializeToString(), WEIGHTS, SIZE)
    inside = numpy_helper.from_array(np.zeros(4, np.float32), "weight")
    check_external_data(GRAPH, model([inside]).SerializeToString(), WEIGHTS, None)

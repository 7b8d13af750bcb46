"""`fewstep inspect` explains what it has verified, and says in one line what is wrong with anything else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewstep import app
from server.engine.engine import Engine
from server.engine.student import StudentManifest, open_student
from server.engine.triton_config import triton_config
from server.inspect import as_text, inspect
from server.table import aligned, readable_size
from tests.test_imports import loaded_after
from tests.tiny_student import FILES

COVERED = [*(f"1/{name}" for name in FILES), "1/student.json", "1/model.py", "config.pbtxt"]


def refusal(folder: Path) -> str:
    """What the command says of a folder that it does not accept."""
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_text_tells_ladder_tables_sizes_digests_and_fingerprint(tiny_repository: Path) -> None:
    folder = tiny_repository / "tiny"
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 0
    manifest, engine = open_student(folder).manifest, Engine.open(folder)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "NFE 1, 2, 3, 4 (default); one set of weights told its NFE" in lines
    assert lines.count("NFE step timestep c0 c1 c2") == 1
    assert "2 1 1000.00 0.5000 0.5000 0.0000" in lines
    assert "64x64 (default) [4, 8, 8]" in lines
    assert sum(line.endswith("verified") for line in lines) == len(FILES)
    assert all(manifest.files[name][:12] in result.stdout for name in FILES)
    assert engine.fingerprint in result.stdout
    assert all(f"{name} {part}" in "\n".join(lines) for name, part in engine.fingerprint_parts.items())
    assert result.stdout == "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n"


def test_json_holds_the_whole_manifest_and_every_size_and_part(tiny_repository: Path) -> None:
    folder = tiny_repository / "tiny"
    said = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)
    student, engine = open_student(folder), Engine.open(folder)
    assert StudentManifest.model_validate(said["manifest"]) == student.manifest
    assert {file["name"]: file["bytes"] for file in said["files"]} == {name: len(b) for name, b in student.files.items()}
    assert said["bytes"] == sum((folder / "1" / name).stat().st_size for name in FILES)
    assert (said["fingerprint"], said["fingerprint_parts"]) == (engine.fingerprint, engine.fingerprint_parts)
    assert said["engines"] == []
    assert said["report"] is None


@pytest.mark.parametrize("name", COVERED)
def test_an_altered_file_is_named_with_the_way_out(own_repository: Path, name: str) -> None:
    path = own_repository / "tiny" / name
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    said = refusal(own_repository / "tiny")
    assert str(path) in said
    assert "fewstep export" in said


@pytest.mark.parametrize("name", COVERED)
def test_a_missing_file_is_named_with_the_way_out(own_repository: Path, name: str) -> None:
    path = own_repository / "tiny" / name
    path.unlink()
    said = refusal(own_repository / "tiny")
    assert f"{path} is missing" in said
    assert "fewstep export" in said


@pytest.mark.parametrize("name", ["extra.onnx", "1/extra.onnx", "1/student_step.onnx.data", "2"])
def test_a_file_that_no_digest_covers_is_named(own_repository: Path, name: str) -> None:
    path = own_repository / "tiny" / name
    path.write_bytes(b"")
    said = refusal(own_repository / "tiny")
    assert str(path) in said
    assert "move it away" in said


def test_what_triton_leaves_behind_is_no_unknown_file(own_repository: Path) -> None:
    (own_repository / "tiny" / "1" / "__pycache__").mkdir()
    inspect(own_repository / "tiny")


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"manifest_sha256": "0"}', "is damaged"),
        ('{"manifest_sha256": "0", "checks": []}', "another student"),
    ],
)
def test_a_report_that_is_damaged_or_of_another_student_is_refused(own_repository: Path, contents: str, said: str) -> None:
    (own_repository / "tiny" / "report.json").write_text(contents)
    assert said in refusal(own_repository / "tiny")


def test_a_folder_that_is_no_exported_student_is_refused_with_what_to_do(own_repository: Path) -> None:
    (own_repository / "tiny" / "nothing").mkdir()
    trained = own_repository / "trained"
    trained.mkdir()
    (trained / "model_index.json").write_text("{}")
    assert "is no folder" in refusal(own_repository / "nowhere")
    assert "has no folder 1" in refusal(own_repository / "tiny" / "nothing")
    assert f"name one: {own_repository / 'tiny'}" in refusal(own_repository)
    assert f"fewstep export {trained}" in refusal(trained)


def test_the_folder_may_be_the_one_where_we_are(own_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_repository / "tiny" / "1")
    assert inspect(Path("..")).fingerprint == inspect(own_repository / "tiny").fingerprint


def test_words_of_a_manifest_cannot_move_the_terminals_cursor(own_repository: Path) -> None:
    path = own_repository / "tiny" / "1" / "student.json"
    manifest = StudentManifest.model_validate_json(path.read_text())
    changed = manifest.model_copy(update={"base": "\x1b[2J\nfiles verified", "training": {"method": "\x1b]0;"}})
    path.write_text(changed.model_dump_json())
    (own_repository / "tiny" / "config.pbtxt").write_text(triton_config(changed))
    said = as_text(inspect(own_repository / "tiny"))
    assert "\x1b" not in said
    assert "\nfiles verified" not in said


def test_the_bundled_student_is_explained(bundled_repository: Path) -> None:
    said = as_text(inspect(bundled_repository / "scenes"))
    assert "TDM (arXiv 2503.06674)" in said
    assert "128x128 (default)" in said


def test_inspecting_loads_neither_torch_nor_onnx(tiny_repository: Path) -> None:
    code = f"from pathlib import Path; from server.inspect import inspect; inspect(Path({str(tiny_repository / 'tiny')!r}))"
    assert not loaded_after(code) & {"torch", "diffusers", "transformers", "onnx", "fastapi"}


def test_who_closes_the_output_early_hears_nothing_of_it(tiny_repository: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fewstep", "inspect", str(tiny_repository / "tiny")]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_columns_line_up_and_no_line_ends_in_spaces() -> None:
    assert aligned([("a", "10", ""), ("long", "9", "x")], right={1}) == ["a     10", "long   9  x"]


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (8901180, "8.9 MB")])
def test_sizes_are_in_the_largest_unit_that_they_fill(count: int, said: str) -> None:
    assert readable_size(count) == said

"""What is served is exactly what was exported, or nothing is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from server.engine.errors import StudentError
from server.engine.student import open_student, student_folders
from server.engine.triton_config import student_parameters, triton_config
from server.gateway.backend import StudentCard
from tests.tiny_student import FILES


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "1" / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path) -> str:
    with pytest.raises(StudentError) as caught:
        open_student(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_sound_student_opens(tiny_repository: Path) -> None:
    student = open_student(tiny_repository / "tiny")
    assert set(student.files) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_byte_is_refused_and_the_file_named(own_repository: Path, name: str) -> None:
    path = own_repository / "tiny" / "1" / name
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    said = refusal(own_repository / "tiny")
    assert str(path) in said
    assert "fewstep export" in said


@pytest.mark.parametrize("name", [*FILES, "student.json", "model.py"])
def test_a_missing_file_is_named(own_repository: Path, name: str) -> None:
    path = own_repository / "tiny" / "1" / name
    path.unlink()
    assert f"{path} is missing" in refusal(own_repository / "tiny")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"format": 1}, "format"),
        ({"media_type": "video"}, "frames, fps and chunks"),
        ({"media_type": "video", "frames": 9, "fps": 8}, "frames, fps and chunks"),
        ({"media_type": "video", "frames": 9, "fps": 8, "chunks": [3]}, "latent shapes of 4 numbers"),
        ({"media_type": "video", "frames": 9, "fps": 8, "chunks": [2], "sizes": {"8x8": [3, 4, 1, 1]}}, "chunks must add up"),
        ({"media_type": "video", "frames": 17, "fps": 8, "chunks": [3, 2], "sizes": {"8x8": [5, 4, 1, 1]}}, "vae_decoder_next"),
        ({"frames": 9, "fps": 8, "chunks": [3]}, "frames, fps and chunks"),
        ({"tokenizers": []}, "tokenizers"),
        ({"conditions": ["text"]}, "conditions"),
        ({"decoder": "other"}, "decoder"),
        ({"nfe": [2, 1]}, "nfe"),
        ({"default_nfe": 9}, "default_nfe"),
        ({"tables": {"1": [[1, 2, 3, 4]]}}, "tables"),
        ({"sizes": {"big": [4, 8, 8]}}, "sizes"),
        ({"sizes": {}}, "sizes"),
        ({"name": "../up"}, "name"),
        ({"name": "other"}, "other"),
        ({"files": {}}, "files"),
        ({"init_noise_sigma": 0}, "init_noise_sigma"),
    ],
)
def test_a_wrong_manifest_is_refused_and_the_field_named(own_repository: Path, changes: dict[str, Any], named: str) -> None:
    rewrite_manifest(own_repository / "tiny", **changes)
    assert named in refusal(own_repository / "tiny")


def test_an_unreadable_manifest_is_refused(own_repository: Path) -> None:
    (own_repository / "tiny" / "1" / "student.json").write_text("{")
    assert "student.json" in refusal(own_repository / "tiny")


def test_a_repository_without_students_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StudentError, match=str(path)):
            student_folders(path)


def test_the_first_student_is_one_of_images(own_repository: Path, clips_repository: Path) -> None:
    shutil.copytree(clips_repository / "tiny-video", own_repository / "a-video")
    assert list(student_folders(own_repository)) == ["tiny", "a-video"]


def test_the_gateway_reads_back_what_the_exporter_wrote_for_triton(tiny_repository: Path) -> None:
    manifest = open_student(tiny_repository / "tiny").manifest
    card = StudentCard.parse(student_parameters(manifest))
    assert card.nfe == tuple(manifest.nfe)
    assert list(card.sizes) == list(manifest.sizes)
    assert card.default_size == "64x64"
    assert (card.frames, card.fps) == (None, None)
    video = manifest.model_copy(update={"media_type": "video", "frames": 17, "fps": 8})
    assert (StudentCard.parse(student_parameters(video)).frames, StudentCard.parse(student_parameters(video)).fps) == (17, 8)
    assert manifest.digest() in triton_config(manifest)


def test_the_bundled_students_are_whole(served_repository: Path) -> None:
    folders = student_folders(served_repository)
    assert list(folders) == ["scenes", "motion"]
    for folder in folders.values():
        manifest = open_student(folder).manifest
        assert (folder / "config.pbtxt").read_text() == triton_config(manifest)

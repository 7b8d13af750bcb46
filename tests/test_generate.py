"""`fewstep generate` chooses the student by the file that is wanted, and writes what the student made."""

from pathlib import Path

import pytest
from PIL import Image

from server.engine.engine import Engine
from server.engine.errors import InvalidRequest, StudentError
from server.engine.request import Request
from server.gateway.video_media import read_mp4, write_mp4
from server.generate import generate_file


def generate(out: Path, repository: Path, student: str | None = None, embed_prompt: bool = False) -> str:
    return generate_file("a red circle", out, 7, 2, None, student, repository, embed_prompt)


def test_the_kind_of_file_chooses_the_student(clips_repository: Path, tmp_path: Path) -> None:
    for name, kind, size in (("a.png", "PNG", (64, 64)), ("a.webp", "WEBP", (64, 64)), ("a.gif", "GIF", (64, 32))):
        generate(tmp_path / name, clips_repository)
        with Image.open(tmp_path / name) as picture:
            assert (picture.format, picture.size) == (kind, size)
    generate(tmp_path / "b.webp", clips_repository, "tiny-video")
    with Image.open(tmp_path / "b.webp") as picture:
        assert picture.n_frames > 1  # type: ignore[attr-defined]


def test_an_mp4_holds_the_student_s_own_frames(clips_repository: Path, tmp_path: Path) -> None:
    said = generate(tmp_path / "a.MP4", clips_repository)
    made = Engine.open(clips_repository / "tiny-video").run(Request("a red circle", 7, 0, 2, "64x32"))
    assert (tmp_path / "a.MP4").read_bytes() == write_mp4(made.image, 8)
    frames, fps = read_mp4((tmp_path / "a.MP4").read_bytes())
    assert (frames.shape, fps) == (made.image.shape, 8)
    assert "64x32, seed 7, 2 NFE" in said


def test_what_cannot_be_made_is_refused_before_anything_is_run(
    clips_repository: Path, tiny_repository: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=r"must end in \.png, \.jpeg, \.webp, \.jpg for tiny, got 'a\.mp4'"):
        generate(tmp_path / "a.mp4", tiny_repository)
    with pytest.raises(InvalidRequest, match=r"must end in \.mp4, \.webp, \.gif for tiny-video, got 'a\.png'"):
        generate(tmp_path / "a.png", clips_repository, "tiny-video")
    with pytest.raises(InvalidRequest, match="--embed-prompt is for pictures"):
        generate(tmp_path / "a.mp4", clips_repository, embed_prompt=True)
    with pytest.raises(StudentError, match="no student 'none'"):
        generate(tmp_path / "a.mp4", clips_repository, "none")
    assert not list(tmp_path.iterdir())

"""A published student is the old one or the new one at every moment."""

import errno
import threading
from pathlib import Path

import pytest

import export.exchange
from export.exchange import put_in_place


def folder(path: Path, says: str) -> Path:
    path.mkdir()
    (path / "student.json").write_text(says)
    return path


def test_a_reader_never_finds_the_place_empty(tmp_path: Path) -> None:
    target, built = folder(tmp_path / "student", "old"), folder(tmp_path / "built", "new")
    seen: set[str] = set()
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.add((target / "student.json").read_text())  # raises where there is nothing

    failed: list[threading.ExceptHookArgs] = []
    before, threading.excepthook = threading.excepthook, failed.append
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(2000):
            put_in_place(built, target)
    finally:
        over.set()
        reader.join()
        threading.excepthook = before
    assert not failed
    assert seen == {"old", "new"}


@pytest.mark.parametrize("supported", [True, False])
def test_the_new_folder_is_in_place_and_the_old_one_where_it_was_built(
    tmp_path: Path, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Path) -> None:
        raise OSError(errno.EINVAL, "no such call here")

    if not supported:
        monkeypatch.setattr(export.exchange, "exchange", refused)
    target, built = folder(tmp_path / "student", "old"), folder(tmp_path / "built", "new")
    put_in_place(built, target)
    assert (target / "student.json").read_text() == "new"
    assert (built / "student.json").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"student", "built"}


def test_a_first_student_is_simply_moved(tmp_path: Path) -> None:
    put_in_place(folder(tmp_path / "built", "new"), tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    target = folder(tmp_path / "student", "old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "nothing", target)
    assert (target / "student.json").read_text() == "old"

"""Files that are whole or not there, whatever happens while they are written: a new name, synced to disk, then renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def publish(fresh: Path, final: Path) -> None:
    """Gives the file or folder `fresh` the name `final`, on the same file system, once all of it is on the disk.

    A folder that has the name already is removed first, so between the two there may be none.
    """
    for path in [*(fresh.rglob("*") if fresh.is_dir() else ()), fresh]:
        sync(path)
    if final.is_dir():
        shutil.rmtree(final)
    fresh.rename(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """Writes a file by `write`, which is given the name to write to; when that fails nothing is left."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        write(fresh)
        publish(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)

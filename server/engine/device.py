"""One device, many students: a lock that is held for one NFE or one decode at a time, with two priorities.

Students live in processes of their own, so the lock is made of files: flock's locks are released by the kernel when their
holder dies, however it dies. Five files per device:

    device   held exclusively while the device works
    images   held shared by everybody of high priority who waits, works or stays; who holds it exclusively knows of none
    turn     held exclusively by the one of low priority who waits or works
    waiting  held exclusively by the one of low priority who waits
    giving   held shared by who gives way, and passed by the one of low priority before it waits

A low-priority holder releases `images` as soon as it has the device, so an image that arrives then waits for that one NFE
and no other: the next low-priority attempt stops at `images` until no image waits. Between its own NFEs an image's scheduler
stays, and gives way at times of its choosing (scheduler.share_device). Locks of flock have no order: who releases one and asks
again is mostly first. So who gives way waits until `waiting` is free, and `giving` stops low priority from coming twice.
"""

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Protocol

from server.engine.errors import StudentError

FOLDER_VARIABLE = "FEWSTEP_LOCKS"


class Priority(Enum):
    """Images go before videos."""

    HIGH = "high"
    LOW = "low"


class Device(Protocol):
    """What a scheduler asks for before each piece of work."""

    def held(self) -> AbstractContextManager[None]:
        """Waits for the device and holds it."""
        ...

    def stay(self) -> None:
        """From now on nobody of low priority comes before the next piece of work. Nothing for who is of low priority."""
        ...

    def give_way(self) -> None:
        """Somebody of low priority, if one waits, has the device once before the next piece of work."""
        ...

    def rest(self) -> None:
        """No work is left for now."""
        ...


class FreeDevice:
    """A device that nobody else wants."""

    def held(self) -> AbstractContextManager[None]:
        return nullcontext()

    def stay(self) -> None: ...

    def give_way(self) -> None: ...

    def rest(self) -> None: ...


def priority_of(media_type: str) -> Priority:
    """Of a student's work: an image waits for at most one NFE of a video."""
    return Priority.LOW if media_type == "video" else Priority.HIGH


class DeviceLock:
    """The lock of one device as one thread sees it. Not to be shared between threads."""

    def __init__(self, device: str, priority: Priority, folder: Path | None = None) -> None:
        """device: e.g. "cpu" or "cuda:0". Raises StudentError when the folder is not ours alone."""
        folder = folder or locks_folder()
        name = re.sub(r"[^a-z0-9]+", "-", device.lower())
        self.files = [
            open_lock(folder / f"{name}.{part}") for part in ("device", "images", "images", "turn", "waiting", "giving")
        ]
        self.device, self.images, self.staying, self.turn, self.waiting, self.giving = self.files
        self.priority = priority

    @contextmanager
    def held(self) -> Iterator[None]:
        """Waits for the device and holds it."""
        take = self.high if self.priority is Priority.HIGH else self.low
        with take():
            yield

    @contextmanager
    def high(self) -> Iterator[None]:
        with locked(self.images, fcntl.LOCK_SH), locked(self.device, fcntl.LOCK_EX):
            yield

    @contextmanager
    def low(self) -> Iterator[None]:
        with locked(self.turn, fcntl.LOCK_EX):
            with locked(self.giving, fcntl.LOCK_EX):
                pass
            with locked(self.waiting, fcntl.LOCK_EX), locked(self.images, fcntl.LOCK_EX):
                fcntl.flock(self.device, fcntl.LOCK_EX)  # free by now: those of high priority also hold `images`
            try:
                yield
            finally:
                fcntl.flock(self.device, fcntl.LOCK_UN)

    def stay(self) -> None:
        if self.priority is Priority.HIGH:
            fcntl.flock(self.staying, fcntl.LOCK_SH)

    def give_way(self) -> None:
        if self.priority is Priority.HIGH:
            with locked(self.giving, fcntl.LOCK_SH):
                self.rest()
                with locked(self.waiting, fcntl.LOCK_SH):
                    self.stay()

    def rest(self) -> None:
        fcntl.flock(self.staying, fcntl.LOCK_UN)

    def close(self) -> None:
        """Gives the files back; may be called once."""
        for descriptor in self.files:
            os.close(descriptor)


@contextmanager
def locked(descriptor: int, how: int) -> Iterator[None]:
    """flock around a block."""
    fcntl.flock(descriptor, how)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def open_lock(path: Path) -> int:
    """A file descriptor of its own: flock's locks belong to those, so two schedulers of one process exclude each other too."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def locks_folder() -> Path:
    """$FEWSTEP_LOCKS, or a folder of this user's own among the temporary ones. Raises StudentError when it is not."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or Path(tempfile.gettempdir()) / f"fewstep-locks-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StudentError(f"{folder} belongs to somebody else; name another folder for device locks in ${FOLDER_VARIABLE}")
    return folder

"""Puts a folder in the place of another in one step, so that whoever opens it finds the old one or the new one, whole."""

import ctypes
import errno
import os
from pathlib import Path

RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100  # fcntl.h: paths are relative to the working directory
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def put_in_place(built: Path, target: Path) -> None:
    """Moves `built` to `target`; what was there before is then at `built`. Both are on one file system.

    By renameat2(2), which exchanges two names at once. Where the system has no such call there is a moment between two
    renames without `target`. Raises OSError, with `target` as it was.
    """
    if not target.exists():
        built.rename(target)
        return
    try:
        exchange(built, target)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        old = built.with_name(f"{built.name}.old")
        target.rename(old)
        built.rename(target)
        old.rename(built)


def exchange(one: Path, other: Path) -> None:
    """Exchanges two names. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))

"""API keys in a file: made and revoked by `fewstep keys`, and heard of by a running server within a second."""

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

logger = logging.getLogger("fewstep")

Scope = Literal["images", "videos", "models", "metrics"]
SHAPE = re.compile(r"fs_([0-9a-f]{8})_[A-Za-z0-9_-]{32,128}")
LOOK_SECONDS = 1.0
NOBODY = "0" * 64  # what a key with an unknown prefix is compared with, so that it takes as long as a known one


class KeysError(ValueError):
    """A file of keys cannot be used, or a key not be made; one line for the terminal."""


class Key(BaseModel):
    """What is kept of a key. requests_per_minute and concurrency: None for no bound of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9 ._@-]{1,64}$")]
    # Once over SHA-256, without salt or stretching: those make guessing dear, and 256 random bits cannot be guessed. A slow
    # hash would only make every request slow, and strangers able to keep the processor busy.
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...]
    requests_per_minute: int | None = Field(None, ge=1, le=100_000)
    concurrency: int | None = Field(None, ge=1, le=100_000)
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def state(self, now: datetime) -> Literal["active", "revoked", "expired"]:
        if self.revoked:
            return "revoked"
        return "expired" if self.expires and now >= self.expires else "active"


class KeysFile(BaseModel):
    """The whole file: JSON, since it is small, read whole, written seldom, and easily looked at, copied and mounted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()


class KeyStore:
    """The keys as a running server knows them. While the file is broken or away, the last good ones stay in force."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds. Raises KeysError when there is no legal file to begin with."""
        self.file, self.clock = file, clock
        self.looked, self.stamp = clock(), stamp(file)
        self.keys = {key.prefix: key for key in read(file).keys}

    def find(self, presented: str) -> Key | None:
        """The key, be it active, revoked or expired; None when nobody was ever given this one."""
        self.look()
        shape = SHAPE.fullmatch(presented)
        key = self.keys.get(shape[1]) if shape else None
        same = hmac.compare_digest(digest(presented), key.sha256 if key else NOBODY)
        return key if same else None

    def look(self) -> None:
        """Reads the file again if it is another one than before, but looks no more than once in LOOK_SECONDS."""
        if self.clock() - self.looked < LOOK_SECONDS:
            return
        self.looked = self.clock()
        # Taken before reading: what changes in between is seen the next time.
        found = stamp(self.file)
        if found == self.stamp:
            return
        self.stamp = found
        try:
            self.keys = {key.prefix: key for key in read(self.file).keys}
        except KeysError as error:
            logger.error("%s; the keys read before stay in force", error)


def create(
    file: Path,
    name: str,
    scopes: Sequence[str],
    requests_per_minute: int | None = None,
    concurrency: int | None = None,
    days: float | None = None,
) -> str:
    """Adds a key, which is kept nowhere but in the returned text. Raises KeysError."""
    now = datetime.now(UTC).replace(microsecond=0)
    with changing(file) as keys:
        while (prefix := secrets.token_hex(4)) in keys:
            pass
        whole = f"fs_{prefix}_{secrets.token_urlsafe(32)}"
        try:
            keys[prefix] = Key(
                prefix=prefix,
                name=name,
                sha256=digest(whole),
                scopes=tuple(scopes),  # type: ignore[arg-type]  # checked by pydantic
                requests_per_minute=requests_per_minute,
                concurrency=concurrency,
                created=now,
                expires=None if days is None else now + timedelta(days=days),
            )
        except ValidationError as error:
            raise KeysError(first_complaint(error)) from None
    return whole


def revoke(file: Path, prefix: str) -> Key:
    """Marks a key as revoked for good; doing so twice changes nothing. Raises KeysError for one that is not there."""
    prefix = prefix.removeprefix("fs_")
    read(file)
    with changing(file) as keys:
        if prefix not in keys:
            raise KeysError(f"{file} has no key with the prefix {prefix!a:.20}; `fewstep keys list` shows all")
        key = keys[prefix]
        if not key.revoked:
            keys[prefix] = key.model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
    return keys[prefix]


def read(file: Path) -> KeysFile:
    """A file of keys. Raises KeysError."""
    try:
        return KeysFile.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        said = f"there is no keys file {file}; `fewstep keys create NAME --keys-file {file}` makes one"
        raise KeysError(said) from None
    except OSError as error:
        raise KeysError(f"keys file {file}: {error.strerror}") from None
    except ValidationError as error:
        raise KeysError(f"keys file {file} is not legal: {first_complaint(error)}") from None


@contextmanager
def changing(file: Path) -> Iterator[dict[str, Key]]:
    """The keys by prefix, written when the block ends well. One process at a time: the folder is locked."""
    file = file.resolve()  # a link stays one
    try:
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KeysError(f"folder {file.parent}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = {key.prefix: key for key in read(file).keys} if file.exists() else {}
        yield keys
        write(file, KeysFile(keys=tuple(keys.values())))
        os.fsync(folder)
    finally:
        os.close(folder)


def write(file: Path, keys: KeysFile) -> None:
    """Puts a file in place whole, readable by its owner alone."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 0600
    try:
        with open(descriptor, "w") as out:
            out.write(keys.model_dump_json(indent=1, exclude_none=True) + "\n")
            out.flush()
            os.fsync(descriptor)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def stamp(file: Path) -> tuple[int, int, int] | None:
    """Changes when the file does: (modification time in ns, inode, size); None without a file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def digest(whole: str) -> str:
    return hashlib.sha256(whole.encode()).hexdigest()


def first_complaint(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def table(keys: Sequence[Key]) -> str:
    """One line per key, for the terminal."""
    now, rows = datetime.now(UTC), [("prefix", "name", "state", "scopes", "a minute", "at once", "created", "expires")]
    for key in keys:
        bounds = (str(key.requests_per_minute or "-"), str(key.concurrency or "-"))
        dates = (f"{key.created:%Y-%m-%d}", f"{key.expires:%Y-%m-%d}" if key.expires else "-")
        rows.append((key.prefix, key.name, key.state(now), ",".join(key.scopes), *bounds, *dates))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

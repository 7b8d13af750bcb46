"""Files of jobs, complete or absent, in a local folder or in S3.

A file is named by its job and the SHA-256 of its bytes. The digest makes writing it twice harmless. The job makes deleting it
safe: its row alone says what is kept, so no other job can be about to refer to bytes that are being swept away.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from server.jobs.errors import JobsMisconfigured, NoSuchFile, StorageUnavailable
from server.jobs.models import StoredFile

CHUNK = 1 << 18  # bytes that are read at a time

Content = bytes | Path


class Storage(Protocol):
    """Methods block, as the store's do. All raise StorageUnavailable."""

    def put(self, job_id: str, content: Content) -> StoredFile:
        """Keeps bytes, or those of a file, for a job. They are on disk when this returns."""
        ...

    def read(self, job_id: str, sha256: str, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from `begin` to before `end`, in chunks; `end` is at most the file's size. Raises NoSuchFile at once."""
        ...

    def job_ids(self) -> Iterator[str]:
        """Of all that have or had files here; there may be others, of other databases."""
        ...

    def prune(self, job_id: str, keep: frozenset[str] = frozenset()) -> int:
        """Deletes all files of a job but those with these digests; returns how many that were."""
        ...


def open_storage(location: str) -> Storage:
    """location: a folder, which is made, or s3://BUCKET/PREFIX. Raises JobsMisconfigured or StorageUnavailable."""
    if location.startswith("s3://"):
        try:
            from server.jobs.s3 import S3Storage
        except ModuleNotFoundError:
            raise JobsMisconfigured("files of jobs in S3 need `pip install 'fewstep[s3]'`") from None
        return S3Storage(location)
    if "://" in location:
        raise JobsMisconfigured(f"files of jobs cannot be kept in {location!a:.80}; legal are a folder and s3://BUCKET/PREFIX")
    return LocalStorage(Path(location))


class LocalStorage:
    """FOLDER/JOB/SHA256, written by temporary file, fsync, rename and fsync of the folder."""

    def __init__(self, folder: Path) -> None:
        """Raises StorageUnavailable when the folder cannot be made."""
        self.folder = folder
        with translated():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, job_id: str, content: Content) -> StoredFile:
        folder = self.folder / job_id
        with opened(content) as source, translated():
            folder.mkdir(exist_ok=True, mode=0o700)
            sync(self.folder)
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".")
            try:
                with open(descriptor, "wb") as out:
                    stored = copy(source, out)
                    out.flush()
                    os.fsync(descriptor)
                os.replace(temporary, folder / stored["sha256"])
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            sync(folder)
        return stored

    def read(self, job_id: str, sha256: str, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
        with translated():
            try:
                file = open(self.folder / job_id / sha256, "rb")  # noqa: SIM115  # `chunks` closes it
            except FileNotFoundError:
                raise NoSuchFile(f"{job_id} has no file {sha256:.16}") from None
        return chunks(file, begin, end)

    def job_ids(self) -> Iterator[str]:
        with translated():
            return iter([folder.name for folder in self.folder.iterdir() if folder.is_dir()])

    def prune(self, job_id: str, keep: frozenset[str] = frozenset()) -> int:
        folder = self.folder / job_id
        if not folder.exists():
            return 0
        with translated():
            doomed = [file for file in folder.iterdir() if file.name not in keep]
            for file in doomed:
                file.unlink(missing_ok=True)
        if not keep:
            with suppress(OSError):  # a worker that was fenced off may be writing there; the next sweep finds it
                folder.rmdir()
        return len(doomed)


def opened(content: Content) -> BinaryIO:
    """To be closed by the caller."""
    return io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")


def copy(source: BinaryIO, out: BinaryIO) -> StoredFile:
    """Writes and digests in one go."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        out.write(chunk)
    return {"sha256": digest.hexdigest(), "size": out.tell()}


def chunks(file: BinaryIO, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """A part of a file, which is closed after it. Raises StorageUnavailable."""
    with file, translated():
        file.seek(begin)
        while chunk := file.read(CHUNK if end is None else min(CHUNK, end - file.tell())):
            yield chunk


def sync(folder: Path) -> None:
    """So that names in it outlive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translated() -> Iterator[None]:
    """What the file system says as StorageUnavailable. The message names no path."""
    try:
        yield
    except OSError as error:
        raise StorageUnavailable(f"the storage of files: {error.strerror}") from error

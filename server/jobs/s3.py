"""Files of jobs in S3, or in what speaks like it.

Who we are and where it is comes from the environment, by the names that all of its clients read: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, and AWS_ALLOW_HTTP=true where there is no TLS.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

from server.jobs.errors import JobsMisconfigured, NoSuchFile, StorageUnavailable
from server.jobs.models import StoredFile
from server.jobs.storage import CHUNK, Content

if TYPE_CHECKING:
    from obstore import GetResult  # which the library has in its stubs alone

PATIENCE = timedelta(seconds=10)  # with a request that fails; then it is a 503, and the worker goes on trying


class S3Storage:
    """PREFIX/JOB/SHA256. An object is there whole or not at all, and S3 compares it with its digest when it comes in."""

    def __init__(self, url: str) -> None:
        """url: s3://BUCKET/PREFIX; nothing is asked of S3 yet. Raises JobsMisconfigured."""
        try:
            self.store = S3Store.from_url(
                url,
                checksum_algorithm="SHA256",
                retry_config={"max_retries": 3, "retry_timeout": PATIENCE},
            )
        except BaseError as error:
            raise JobsMisconfigured(f"files of jobs cannot be kept in {url!a:.80}: {first_line(error)}") from None

    def put(self, job_id: str, content: Content) -> StoredFile:
        if isinstance(content, bytes):
            stored: StoredFile = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        else:
            with open(content, "rb") as file:
                stored = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": content.stat().st_size}
        with translated():
            obstore.put(self.store, f"{job_id}/{stored['sha256']}", content)
        return stored

    def read(self, job_id: str, sha256: str, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
        if begin == end:
            return iter(())
        with translated():
            try:
                part = obstore.get(
                    self.store, f"{job_id}/{sha256}", options={"range": {"offset": begin} if end is None else (begin, end)}
                )
            except (NotFoundError, FileNotFoundError):
                raise NoSuchFile(f"{job_id} has no file {sha256:.16}") from None
        return chunks(part)

    def job_ids(self) -> Iterator[str]:
        with translated():
            found = obstore.list_with_delimiter(self.store)["common_prefixes"]
        return iter([prefix.rstrip("/").rpartition("/")[2] for prefix in found])

    def prune(self, job_id: str, keep: frozenset[str] = frozenset()) -> int:
        with translated():
            pages = obstore.list(self.store, prefix=f"{job_id}/")
            doomed = [file["path"] for page in pages for file in page if file["path"].rpartition("/")[2] not in keep]
            if doomed:
                obstore.delete(self.store, doomed)
        return len(doomed)


def chunks(part: "GetResult") -> Iterator[bytes]:
    """Raises StorageUnavailable."""
    with translated():
        for chunk in part.stream(min_chunk_size=CHUNK):
            yield bytes(chunk)


def first_line(error: BaseError) -> str:
    """The library explains itself over many lines."""
    return str(error).partition("\n")[0]


@contextmanager
def translated() -> Iterator[None]:
    """Whatever S3 does not give or take now is StorageUnavailable."""
    try:
        yield
    except (BaseError, OSError) as error:
        raise StorageUnavailable(f"the storage of files: {str(error).partition(chr(10))[0]:.200}") from error

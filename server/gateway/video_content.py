"""The files of a finished video: as they are stored, or made from the mp4 when another format is asked for."""

import asyncio
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from cachetools import LRUCache

from server.gateway.media import THREADS
from server.gateway.video_answers import file_of
from server.gateway.video_media import MEDIA_TYPES, VideoFormat, animate
from server.jobs.models import Job
from server.jobs.storage import Storage
from server.jobs.threads import beside

BUDGET = 64 * 10**6  # bytes of animations, so that one read in pieces is made once


@dataclass(frozen=True)
class Content:
    """A file that can be read from. tag: its ETag; kept: its bytes, where they are in memory."""

    tag: str
    size: int
    media_type: str
    storage: Storage
    job_id: str
    sha256: str
    kept: bytes | None = None

    async def read(self, part: range | None) -> Iterable[bytes]:
        """The bytes of a part, or all, in chunks that may block. Raises NoSuchFile or StorageUnavailable."""
        begin, end = (part.start, part.stop) if part else (0, self.size)
        if self.kept is not None:
            return [self.kept[begin:end]]
        return await beside(self.storage.read, self.job_id, self.sha256, begin, end)


class Contents:
    """The files of jobs in one storage."""

    def __init__(self) -> None:
        self.animations: LRUCache[tuple[str, str], bytes] = LRUCache(BUDGET, getsizeof=len)

    async def find(self, storage: Storage, job: Job, variant: str, format: VideoFormat | None) -> Content:
        """Raises ApiError 404 or 410, NoSuchFile or StorageUnavailable."""
        file = file_of(job, variant)
        stored = partial(Content, storage=storage, job_id=job.id, sha256=file["sha256"])
        if variant == "thumbnail":
            return stored(f'"{file["sha256"]}"', file["size"], "image/webp")
        if format is None or format == "mp4":
            return stored(f'"{file["sha256"]}"', file["size"], MEDIA_TYPES["mp4"])
        made = self.animations.get((file["sha256"], format)) or await self.animate(storage, job, file["sha256"], format)
        return stored(f'"{hashlib.sha256(made).hexdigest()}"', len(made), MEDIA_TYPES[format], kept=made)

    async def animate(self, storage: Storage, job: Job, sha256: str, format: Literal["webp", "gif"]) -> bytes:
        mp4 = b"".join(await beside(lambda: list(storage.read(job.id, sha256))))
        made = await asyncio.get_running_loop().run_in_executor(THREADS, animate, mp4, format)
        if len(made) <= BUDGET:
            self.animations[sha256, format] = made
        return made

"""What happens to the jobs that this process makes, told to whoever listens at that moment."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from server.gateway.video_media import Frames


@dataclass(frozen=True)
class Executed:
    """So many NFEs of the present attempt."""

    nfe: int


@dataclass(frozen=True)
class Partial:
    """The x0 prediction after NFE `step`, uint8 [f, H, W, 3]."""

    step: int
    frames: Frames


Happened = Executed | Partial
Ear = asyncio.Queue[Happened]


class Broadcast:
    """By job. Listeners that come late hear the last prediction."""

    def __init__(self) -> None:
        self.ears: defaultdict[str, set[Ear]] = defaultdict(set)
        self.partials: dict[str, Partial] = {}

    @contextmanager
    def making(self, job_id: str) -> Iterator[None]:
        """While an attempt at a job is under way here."""
        self.tell(job_id, Executed(0))
        try:
            yield
        finally:
            self.partials.pop(job_id, None)

    def tell(self, job_id: str, happened: Happened) -> None:
        if isinstance(happened, Partial):
            self.partials[job_id] = happened
        for ear in self.ears.get(job_id, ()):
            ear.put_nowait(happened)

    @contextmanager
    def listening(self, job_id: str) -> Iterator[Ear]:
        """What happens from now on, in order."""
        ear: Ear = asyncio.Queue()
        if job_id in self.partials:
            ear.put_nowait(self.partials[job_id])
        self.ears[job_id].add(ear)
        try:
            yield ear
        finally:
            self.ears[job_id].remove(ear)
            if not self.ears[job_id]:
                del self.ears[job_id]

"""How much memory the processes that run students have, as Linux counts it."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

PERIOD_SECONDS = 0.1
PAGE = os.sysconf("SC_PAGE_SIZE")
MEGABYTE = 10**6


class Peak:
    """The most that was seen, bytes. Memory is looked at ten times a second, and a peak between two looks is missed: the
    kernel's own high-water mark is of a process's whole life, not of one job."""

    def __init__(self, processes: Callable[[], Iterable[int]]) -> None:
        self.processes, self.bytes = processes, 0

    def look(self) -> None:
        self.bytes = max(self.bytes, resident(self.processes()))

    @property
    def megabytes(self) -> float:
        return round(self.bytes / MEGABYTE, 1)


@asynccontextmanager
async def watched(processes: Callable[[], Iterable[int]]) -> AsyncIterator[Peak]:
    """Looks at the memory of these processes until the block ends; which they are is asked each time."""
    peak = Peak(processes)

    async def watch() -> None:
        while True:
            peak.look()
            await asyncio.sleep(PERIOD_SECONDS)

    watching = asyncio.create_task(watch())
    try:
        yield peak
        peak.look()
    finally:
        watching.cancel()


def resident(processes: Iterable[int]) -> int:
    """Bytes of all together; a process that has ended has none. Pages that two of them share count twice."""
    total = 0
    for process in processes:
        with suppress(OSError):
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
    return total

"""Finished images by all that decides them: repeats are answered from memory or disk, equal requests share one run.

A request with a seed decides its pixels, so nothing ever goes stale: a student or runtime that changes has another
fingerprint, and with it other keys.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache

from server.gateway.backend import DeadlineExceeded
from server.gateway.made import Made
from server.gateway.result_files import ResultFiles

ENTRY_BYTES = 1024  # what an entry weighs beside its file


@dataclass(eq=False)
class Flight:
    """An image under way, and how many wait for it."""

    task: "asyncio.Task[Made]"
    waiters: int = 0


class Results:
    """Bounded by bytes, least recently used ones go first. One event loop uses it."""

    def __init__(self, memory_bytes: int, files: ResultFiles | None = None) -> None:
        self.memory: LRUCache[str, Made] = LRUCache(memory_bytes, lambda made: len(made.file.content) + ENTRY_BYTES)
        self.files = files
        self.flights: dict[str, Flight] = {}

    async def find(self, key: str, image_index: int) -> Made | None:
        """A kept image, marked as cached."""
        made: Made | None = self.memory.get(key)
        if made is None and self.files and (made := await asyncio.to_thread(self.files.read, key, image_index)):
            self.remember(key, made)
        return made and made.of_another("cached")

    def keep(self, key: str, made: Made) -> None:
        """For those who ask later; the disk's part happens beside."""
        self.remember(key, made)
        if self.files:
            asyncio.get_running_loop().run_in_executor(None, self.files.write, key, made)

    def remember(self, key: str, made: Made) -> None:
        if len(made.file.content) + ENTRY_BYTES <= self.memory.maxsize:
            self.memory[key] = made

    async def share(self, key: str, deadline: float, execute: Callable[[], Coroutine[Any, Any, Made]]) -> Made:
        """The image of a flight that is under way, else of a new one; it is cancelled when nobody waits for it any more.

        deadline: of this request, on the clock of time.monotonic. Raises DeadlineExceeded when it passes; one that passed for
        whoever began the flight is no reason to fail the others.
        """
        while True:
            flight, joined = self.flights.get(key), True
            if flight is None:
                flight, joined = self.begin(key, execute), False
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0.0) if joined else None):
                    made = await self.wait(key, flight)
            except TimeoutError:
                raise DeadlineExceeded("the deadline passed before the image was done") from None
            except DeadlineExceeded:
                if joined and time.monotonic() < deadline:
                    continue
                raise
            return made.of_another("shared") if joined else made

    def begin(self, key: str, execute: Callable[[], Coroutine[Any, Any, Made]]) -> Flight:
        """Starts the work and lets others find it until it is done."""
        flight = self.flights[key] = Flight(asyncio.create_task(execute()))

        def landed(task: "asyncio.Task[Made]") -> None:
            self.forget(key, flight)
            if not task.cancelled():
                task.exception()  # told to whoever waits; with nobody left, asyncio would call it forgotten

        flight.task.add_done_callback(landed)
        return flight

    async def wait(self, key: str, flight: Flight) -> Made:
        """Waits with the others. The last one to go away ends the flight."""
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters:
                self.forget(key, flight)
                flight.task.cancel()

    def forget(self, key: str, flight: Flight) -> None:
        """From now on nobody joins this flight."""
        if self.flights.get(key) is flight:
            del self.flights[key]

"""Takes jobs from the store and has them made, one at a time; any number of workers, in any number of processes."""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from server.jobs.errors import JobFailed, LeaseLost, StoreUnavailable, TryAgain, Unavailable
from server.jobs.models import Facts, Job, Lease
from server.jobs.storage import Content, Storage
from server.jobs.store import JobStore
from server.jobs.threads import beside

logger = logging.getLogger("fewstep")

POLL_SECONDS = 1.0  # until a job that another process took in is seen, and between two tries of what is not available
RETRY_SECONDS = 5.0  # before a job is tried again after what made it has died

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Result:
    """What was made: files by variant ("video", "thumbnail"), and what is known of them."""

    files: Mapping[str, Content]
    facts: Facts


OnProgress = Callable[[int], None]  # hears of the number of executed NFEs, on the event loop
Make = Callable[[Job, OnProgress], Awaitable[Result]]


class Worker:
    """One job at a time.

    make: a coroutine, which is cancelled when the job is cancelled or deleted, when another worker has it, or when we stop. It
    raises JobFailed for a job that cannot be made and TryAgain when what it runs on has died."""

    def __init__(self, store: JobStore, storage: Storage, make: Make, poll_seconds: float = POLL_SECONDS) -> None:
        self.store, self.storage, self.make, self.poll_seconds = store, storage, make, poll_seconds
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.stopping, self.woken = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Until `stop`. The job under way is then back in the queue, for the next worker to take at once."""
        while not self.stopping.is_set():
            lease = await self.claim()
            await (self.work(lease) if lease else self.rest())

    def wake(self) -> None:
        """There may be a job now."""
        self.woken.set()

    def stop(self) -> None:
        """Makes `run` return."""
        self.stopping.set()
        self.wake()

    async def claim(self) -> Lease | None:
        """None also when the store gives none for whatever reason: a worker that ended over it would leave all jobs to wait."""
        try:
            return await beside(self.store.claim, self.name)
        except Exception as error:
            logger.error("no job is taken for now: %s: %s", type(error).__name__, error)
            return None

    async def rest(self) -> None:
        """Until there may be a job again."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.poll_seconds):
                await self.woken.wait()
        self.woken.clear()

    async def work(self, lease: Lease) -> None:
        """A job to its end, or for as long as it is ours and we are not to stop."""
        progress = Progress()
        finishing = asyncio.create_task(self.finish(lease, progress.on_progress))
        tasks = (finishing, asyncio.create_task(self.beat(lease, progress)), asyncio.create_task(self.stopping.wait()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):  # which a cancellation is not
                    logger.warning("%s: %s: %s", lease.job.id, type(ended).__name__, ended)
            if finishing.cancelled():
                with suppress(LeaseLost, StoreUnavailable):
                    await beside(self.store.release, lease)

    async def finish(self, lease: Lease, on_progress: OnProgress) -> None:
        """Makes a job, keeps its files, and only then says that it is complete."""
        try:
            result = await self.make(lease.job, on_progress)
        except JobFailed as error:
            await self.insist(self.store.fail, lease, error.code, str(error))
        except TryAgain as error:
            logger.warning("%s will be tried again: %s", lease.job.id, error)
            await self.insist(self.store.release, lease, RETRY_SECONDS, True)
        except Exception as error:
            logger.error("%s: %s: %s", lease.job.id, type(error).__name__, error)
            await self.insist(self.store.fail, lease, "internal_error", "internal error; name the job's id when you report it")
        else:
            put = self.storage.put
            files = {variant: await self.insist(put, lease.job.id, content) for variant, content in result.files.items()}
            await self.insist(self.store.complete, lease, files, result.facts)

    async def beat(self, lease: Lease, progress: "Progress") -> None:
        """Tells the store that we are alive, and of every NFE. Returns when the job is no longer ours."""
        while True:
            executed = await progress.next(self.store.lease_seconds / 3)
            try:
                await beside(self.store.heartbeat, lease, executed)
            except LeaseLost as error:
                logger.info("%s", error)
                return
            except Exception as error:
                logger.error("%s: no heartbeat for now: %s: %s", lease.job.id, type(error).__name__, error)

    async def insist(
        self, function: Callable[Parameters, Returned], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Returned:
        """Tries until disk and database are there again, while the heartbeats keep the job ours. Raises LeaseLost."""
        while True:
            try:
                return await beside(function, *args, **kwargs)
            except Unavailable as error:
                logger.warning("what was made is kept until it can be stored: %s", error)
                await asyncio.sleep(self.poll_seconds)


class Progress:
    """The number of NFEs that have been executed, and word of every change."""

    def __init__(self) -> None:
        self.executed, self.changed = 0, asyncio.Event()

    def on_progress(self, executed: int) -> None:
        self.executed = executed
        self.changed.set()

    async def next(self, seconds: float) -> int:
        """The number, when it has changed or the seconds are over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):  # wait_for of Python 3.11 may lose a cancellation
                await self.changed.wait()
        self.changed.clear()
        return self.executed

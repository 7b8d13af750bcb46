"""Videos as jobs: taken in while they can be done in time, found again, and made by workers of this or another process."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from server.gateway.admission import Admission
from server.gateway.backend import Backend
from server.gateway.broadcast import Broadcast
from server.gateway.plan import find_student
from server.gateway.settings import Settings
from server.gateway.video_maker import VideoMaker
from server.gateway.video_plan import VideoPlan
from server.jobs.errors import JobsMisconfigured, StoreUnavailable, Unavailable
from server.jobs.models import Job, Work
from server.jobs.storage import Storage, open_storage
from server.jobs.store import JobStore
from server.jobs.sweep import keep_sweeping
from server.jobs.threads import beside
from server.jobs.worker import Worker

logger = logging.getLogger("fewstep")

DATABASE, FILES = "jobs.sqlite", "files"  # in jobs_folder
RETRY_SECONDS = 2.0  # between two tries to open what is not there yet
SOONEST_MS, LATEST_MS = 100, 5000  # of openai-poll-after-ms: the openai client keeps to the first one it is told
LOOKS = 4  # at a job until it is done, if the prediction holds


class VideoJobs:
    """Opened by `start`, and only where a student makes videos; routes that come before are answered with 404 or 503."""

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend, self.settings = backend, settings
        self.admission = Admission(settings.max_video_queue_seconds, settings.key_share if settings.keys_file else 1.0)
        self.broadcast = Broadcast()
        self.maker = VideoMaker(backend, self.admission, self.broadcast)
        self.opened: tuple[JobStore, Storage] | None = None
        self.workers: list[Worker] = []
        self.stopping = asyncio.Event()
        self.running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """To be called when the backend has started. What is not available now is waited for in the background. Raises
        ValueError where it cannot be used as it was configured."""
        if not any(student.media_type == "video" for student in self.backend.students.values()):
            return
        try:
            await self.open()
        except Unavailable as error:
            logger.warning("video jobs have to wait: %s", error)
        except JobsMisconfigured as error:
            raise ValueError(str(error)) from None
        self.running = asyncio.create_task(self.run())

    def leave(self) -> None:
        """Jobs under way go back to the queue, for the next start or another process to take at once. The rest goes on."""
        self.stopping.set()
        for worker in self.workers:
            worker.stop()

    async def stop(self) -> None:
        """Leaves all jobs and closes the store."""
        self.leave()
        if self.running:
            await asyncio.gather(self.running, return_exceptions=True)
        if self.opened:
            self.opened[0].close()

    async def open(self) -> None:
        """Raises Unavailable or JobsMisconfigured."""
        settings, expiry = self.settings, float(self.settings.video_ttl_seconds)
        url = settings.jobs_url.get_secret_value() if settings.jobs_url else f"sqlite:///{settings.jobs_folder / DATABASE}"
        storage = await beside(open_storage, settings.jobs_storage or str(settings.jobs_folder / FILES))
        store = await beside(JobStore, url, attempts=settings.video_attempts, expiry_seconds=expiry)
        self.workers = [Worker(store, storage, self.maker.job) for _ in range(settings.video_workers)]
        self.opened = store, storage

    async def run(self) -> None:
        """Workers and the sweep, from when there is something to work on until `stop`."""
        while not self.opened and not await happened(self.stopping, RETRY_SECONDS):
            with suppress(Unavailable):
                await self.open()
        if not self.opened:
            return
        sweeping = asyncio.create_task(keep_sweeping(*self.opened))
        try:
            await asyncio.gather(self.stopping.wait(), *(worker.run() for worker in self.workers))
        finally:
            sweeping.cancel()
            await asyncio.gather(sweeping, return_exceptions=True)

    @property
    def store(self) -> JobStore:
        return self.ready()[0]

    @property
    def storage(self) -> Storage:
        return self.ready()[1]

    def ready(self) -> tuple[JobStore, Storage]:
        """Raises ApiError 404 where no student makes videos, or 503 before it is known; StoreUnavailable."""
        find_student(None, self.backend.students, "video")
        if self.opened is None:
            raise StoreUnavailable("not opened yet")
        return self.opened

    async def take(self, plan: VideoPlan, key: str | None, body_sha256: str) -> Job:
        """A job that is on disk, or the one that was made with this idempotency key before. Raises ApiError 429 or 503 where
        there is no room for another one, InvalidRequest, IdempotencyConflict, StoreUnavailable."""
        self.backend.check_prompt(plan.student.name, plan.prompt)

        def admit(waiting: dict[str, Work]) -> None:
            self.admission.check(self.admission.ticket(plan, 1), self.nanoseconds(waiting, plan))

        job, created = await beside(self.store.create, plan.document(), plan.who, plan.nfe, key, body_sha256, admit)
        if created:
            for worker in self.workers:
                worker.wake()
        return job

    @asynccontextmanager
    async def admitted(self, plan: VideoPlan) -> AsyncIterator[None]:
        """Room for a video that is no job, beside all jobs; where they cannot be asked for, none of them is worked on. Raises
        ApiError 429 or 503."""
        waiting: dict[str, Work] = {}
        with suppress(StoreUnavailable):
            waiting = await beside(self.store.waiting)
        with self.admission.admitted(plan, 1, self.nanoseconds(waiting, plan)):
            yield

    def nanoseconds(self, waiting: dict[str, Work], plan: VideoPlan) -> dict[str, int]:
        """Of the device for what waits, by owner, as if all were videos like the planned one."""
        cost = self.admission.costs[plan.student.name, plan.size]
        return {who: round((work.nfe * cost.nfe + work.jobs * cost.image) * 1e9) for who, work in waiting.items()}

    async def cancel(self, job_id: str, owner: str) -> Job:
        """Raises NoSuchJob or StoreUnavailable."""
        job = await beside(self.store.cancel, job_id, owner)
        self.maker.look_up(job_id)
        return job

    async def delete(self, job_id: str, owner: str) -> None:
        """Raises NoSuchJob or StoreUnavailable."""
        await beside(self.store.delete, job_id, owner)
        self.maker.look_up(job_id)

    async def poll_after_ms(self, job: Job) -> int:
        """When it is worth looking at a job again, by what is predicted of those before it and of its own rest."""
        cost = self.admission.costs[job.request["model"], job.request["size"]]
        nfe = await beside(self.store.ahead, job) + job.nfe - job.executed_nfe
        return round(min(max((nfe * cost.nfe + cost.image) * 1000 / LOOKS, SOONEST_MS), LATEST_MS))

    async def counts(self) -> dict[str, dict[str, int]] | None:
        """Of all jobs in the database, by status and, of those that failed, by code; None where there are none to count."""
        if self.opened is None:
            return None
        try:
            by_status = await beside(self.store.counts)
            return {
                "status": {str(name): count for name, count in by_status.items()},
                "failed": await beside(self.store.failures),
            }
        except StoreUnavailable:
            return None


async def happened(event: asyncio.Event, seconds: float) -> bool:
    """Whether it has, waiting for so long at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()

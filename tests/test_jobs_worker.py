"""Workers: jobs from the queue to their end, whatever happens meanwhile."""

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from server.jobs.errors import JobFailed, TryAgain
from server.jobs.models import Facts, Job
from server.jobs.storage import LocalStorage
from server.jobs.store import JobStore
from server.jobs.worker import RETRY_SECONDS, Make, OnProgress, Result, Worker
from tests.fakes import FakeClock

FACTS = Facts("ef" * 32, "fp-1", 1.5, 200.0, {})
PATIENCE = 60  # seconds; nothing here takes one of them on a machine that has nothing else to do

Condition = Callable[[], bool]


@pytest.fixture
def files(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "files")


def create(store: JobStore, owner: str = "ann") -> Job:
    return store.create({"prompt": "a"}, owner, 4)[0]


async def clip(job: Job, on_progress: OnProgress) -> Result:
    """Made in no time."""
    for executed in range(1, 5):
        on_progress(executed)
        await asyncio.sleep(0)
    return Result({"video": b"clip of " + job.id.encode(), "thumbnail": b"thumbnail"}, FACTS)


class Slow:
    """An NFE is executed whenever the test says so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.executed = 0
        self.go = asyncio.Event()

    async def __call__(self, job: Job, on_progress: OnProgress) -> Result:
        self.begun.append(job.id)
        for executed in range(1, 5):
            await self.go.wait()
            self.go.clear()
            self.executed = executed
            on_progress(executed)
        return Result({"video": b"clip"}, FACTS)


async def until(condition: Condition) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def working(store: JobStore, files: LocalStorage, make: Make, test: Callable[[Worker], Awaitable[None]]) -> None:
    """Runs a test beside a worker, and then stops that."""

    async def main() -> None:
        worker = Worker(store, files, make, poll_seconds=0.01)
        running = asyncio.create_task(worker.run())
        try:
            await test(worker)
        finally:
            worker.stop()
            async with asyncio.timeout(PATIENCE):
                await running

    asyncio.run(main())


def status(store: JobStore, job: Job) -> str:
    return store.get(job.id, job.owner).status


def test_a_job_ends_with_its_files_in_the_storage(store: JobStore, files: LocalStorage) -> None:
    first, second = create(store), create(store)

    async def test(worker: Worker) -> None:
        await until(lambda: status(store, second) == "completed")

    working(store, files, clip, test)
    for job in (first, second):
        done = store.get(job.id, "ann")
        video, thumbnail = (b"".join(files.read(job.id, done.files[name]["sha256"])) for name in ("video", "thumbnail"))
        assert (video, thumbnail) == (b"clip of " + job.id.encode(), b"thumbnail")
        assert (done.progress, done.pixel_sha256, done.attempts) == (100, FACTS.pixel_sha256, 1)


def test_progress_is_told_after_every_nfe(store: JobStore, files: LocalStorage) -> None:
    job = create(store)

    async def test(worker: Worker) -> None:
        for executed in range(1, 4):
            slow.go.set()
            await until(lambda executed=executed: store.get(job.id, "ann").executed_nfe == executed)
        slow.go.set()
        await until(lambda: status(store, job) == "completed")

    slow = Slow()
    working(store, files, slow, test)


@pytest.mark.parametrize("end", [JobStore.cancel, JobStore.delete])
def test_a_job_that_its_owner_ends_stops_within_one_nfe(
    store: JobStore, files: LocalStorage, end: Callable[[JobStore, str, str], object]
) -> None:
    job = create(store)

    async def test(worker: Worker) -> None:
        await until(lambda: slow.begun == [job.id])
        end(store, job.id, "ann")
        slow.go.set()  # the NFE that is under way
        await until(lambda: slow.executed == 1)
        neighbour = create(store)
        await until(lambda: slow.begun == [job.id, neighbour.id])
        assert slow.executed == 1

    slow = Slow()
    working(store, files, slow, test)
    assert list(files.job_ids()) == []


def test_a_stopped_worker_gives_its_job_back_for_the_next_to_take_at_once(store: JobStore, files: LocalStorage) -> None:
    job = create(store)

    async def test(worker: Worker) -> None:
        slow.go.set()
        await until(lambda: slow.executed == 1)

    slow = Slow()
    working(store, files, slow, test)
    released = store.get(job.id, "ann")
    assert (released.status, released.executed_nfe, released.attempts) == ("queued", 0, 0)

    async def again(worker: Worker) -> None:
        await until(lambda: status(store, job) == "completed")

    working(store, files, clip, again)


def test_a_cancelled_worker_gives_its_job_back_too(store: JobStore, files: LocalStorage) -> None:
    job = create(store)

    async def main() -> None:
        slow = Slow()
        running = asyncio.create_task(Worker(store, files, slow).run())
        await until(lambda: slow.begun == [job.id])
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert status(store, job) == "queued"


def test_a_worker_whose_job_was_taken_leaves_it(store: JobStore, files: LocalStorage, clock: FakeClock) -> None:
    job = create(store)

    async def test(worker: Worker) -> None:
        await until(lambda: slow.begun == [job.id])
        clock.now += 1000
        lease = store.claim("other")
        assert lease
        slow.go.set()
        neighbour = create(store)
        await until(lambda: slow.begun == [job.id, neighbour.id])
        assert store.get(job.id, "ann").worker == "other"
        assert store.complete(lease, {}, FACTS).status == "completed"

    slow = Slow()
    working(store, files, slow, test)


def test_a_worker_that_is_alive_keeps_its_job_beyond_the_lease(jobs_url: str, files: LocalStorage) -> None:
    store = JobStore(jobs_url, lease_seconds=0.3)
    job = create(store)

    async def test(worker: Worker) -> None:
        await until(lambda: slow.begun == [job.id])
        over = (store.get(job.id, "ann").started_at or 0) + 2 * store.lease_seconds
        await until(lambda: (store.get(job.id, "ann").available_at or 0) > over)
        for executed in range(1, 5):
            slow.go.set()
            await until(lambda executed=executed: slow.executed == executed)
        await until(lambda: status(store, job) == "completed")

    slow = Slow()
    working(store, files, slow, test)
    assert slow.begun == [job.id]
    store.close()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (JobFailed("numerical_error", "not finite"), "numerical_error", "not finite"),
        (RuntimeError("/secret/path"), "internal_error", "internal error; name the job's id when you report it"),
    ],
)
def test_a_job_that_cannot_be_made_fails_with_its_reason(
    store: JobStore, files: LocalStorage, error: Exception, code: str, message: str
) -> None:
    job = create(store)

    async def make(job: Job, on_progress: OnProgress) -> Result:
        raise error

    async def test(worker: Worker) -> None:
        await until(lambda: status(store, job) == "failed")

    working(store, files, make, test)
    failed = store.get(job.id, "ann")
    assert (failed.error_code, failed.error_message, failed.files) == (code, message, {})


def test_a_job_is_tried_again_after_a_pause_when_what_made_it_died_and_its_neighbours_go_on(
    store: JobStore, files: LocalStorage, clock: FakeClock
) -> None:
    killer, neighbour = create(store), create(store)
    tries = []

    async def make(job: Job, on_progress: OnProgress) -> Result:
        if job.id == killer.id:
            tries.append(job.attempts)
            raise TryAgain("the backend is down")
        return await clip(job, on_progress)

    async def test(worker: Worker) -> None:
        await until(lambda: status(store, neighbour) == "completed")
        for attempt in (1, 2):
            await until(lambda attempt=attempt: len(tries) == attempt and status(store, killer) == "queued")
            clock.now += RETRY_SECONDS
        await until(lambda: status(store, killer) == "failed")

    working(store, files, make, test)
    assert tries == [1, 2, 3]
    assert store.get(killer.id, "ann").error_code == "worker_died"


def test_what_was_made_is_kept_until_the_storage_takes_it(
    store: JobStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = LocalStorage(tmp_path / "files")
    files.folder.rmdir()  # as when a disk is not mounted
    job = create(store)
    made = []

    async def make(job: Job, on_progress: OnProgress) -> Result:
        made.append(job.id)
        return await clip(job, on_progress)

    async def test(worker: Worker) -> None:
        await until(lambda: "until it can be stored" in caplog.text)
        assert status(store, job) == "in_progress"
        files.folder.mkdir()
        await until(lambda: status(store, job) == "completed")

    with caplog.at_level(logging.WARNING):
        working(store, files, make, test)
    assert made == [job.id]


def test_workers_wait_for_a_database_that_is_locked(
    tmp_path: Path, files: LocalStorage, caplog: pytest.LogCaptureFixture
) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite", wait_seconds=0.05)
    job = create(store)
    other = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)

    async def test(worker: Worker) -> None:
        await until(lambda: slow.begun == [job.id])
        other.execute("BEGIN EXCLUSIVE")
        for executed in range(1, 5):
            slow.go.set()
            await until(lambda executed=executed: slow.executed == executed)
        await until(lambda: "no heartbeat for now" in caplog.text and "until it can be stored" in caplog.text)
        other.execute("ROLLBACK")
        await until(lambda: status(store, job) == "completed")
        other.execute("BEGIN EXCLUSIVE")
        await until(lambda: "no job is taken for now" in caplog.text)
        other.execute("ROLLBACK")
        second = create(store)
        await until(lambda: slow.begun == [job.id, second.id])

    slow = Slow()
    with caplog.at_level(logging.WARNING):
        working(store, files, slow, test)
    assert slow.begun[0] == job.id
    store.close()


def test_workers_of_one_process_share_the_queue(store: JobStore, files: LocalStorage) -> None:
    jobs = [create(store, f"owner {number}") for number in range(6)]
    together = asyncio.Barrier(3)

    async def make(job: Job, on_progress: OnProgress) -> Result:
        async with asyncio.timeout(PATIENCE):
            await together.wait()  # passes only when three jobs are under way at once
        return await clip(job, on_progress)

    async def main() -> None:
        workers = [Worker(store, files, make, poll_seconds=0.01) for _ in range(3)]
        running = [asyncio.create_task(worker.run()) for worker in workers]
        await until(lambda: all(status(store, job) == "completed" for job in jobs))
        for worker in workers:
            worker.stop()
        await asyncio.gather(*running)

    asyncio.run(main())
    assert [store.get(job.id, job.owner).attempts for job in jobs] == [1] * 6

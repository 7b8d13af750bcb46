"""Processes that are killed, stopped and raced: no job is lost, none is made twice in effect, and the pixels are the same."""

import hashlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from server.jobs.errors import LeaseLost
from server.jobs.models import Facts, Job, Lease
from server.jobs.storage import LocalStorage
from server.jobs.store import JobStore
from server.jobs.sweep import sweep
from tests.jobs_program import POINTS, PROCESSES, Program

PATIENCE = 60  # seconds
HOUR = 3600.0
BEGUN = POINTS[3:-1]  # points at which making has begun and is not known to be complete

NewProgram = Callable[..., Program]


@pytest.fixture
def program(jobs_url: str, tmp_path: Path, clips_repository: Path) -> NewProgram:
    """Makes programs that share a database and a folder."""
    return partial(Program, jobs_url, tmp_path, clips_repository)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory, clips_repository: Path) -> str:
    """The digest of the frames as nobody has disturbed their making."""
    folder = tmp_path_factory.mktemp("undisturbed")
    alone = Program(f"sqlite:///{folder}/jobs.sqlite", folder, clips_repository)
    assert alone.run() == 0
    return the_job(alone).pixel_sha256 or ""


def the_job(program: Program) -> Job:
    """The only one there is."""
    store = JobStore(program.url)
    (job,) = store.page("ann").jobs
    store.close()
    return job


def executions(program: Program) -> int:
    return len((program.folder / "executions").read_text().splitlines())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stopped(process: ForkServerProcess) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def check_the_job(program: Program, pixels: str) -> Job:
    """One job, complete, with its pixels and nothing else in the storage, and nobody about to make it again."""
    job, store, files = the_job(program), JobStore(program.url), LocalStorage(program.folder / "files")
    assert (job.status, job.pixel_sha256, job.progress) == ("completed", pixels, 100)
    assert hashlib.sha256(b"".join(files.read(job.id, job.files["video"]["sha256"]))).hexdigest() == pixels
    sweep(store, files)
    assert [file.name for file in (program.folder / "files").rglob("*") if file.is_file()] == [pixels]
    assert store.claim("nobody") is None
    store.close()
    return job


@pytest.mark.parametrize("point", POINTS)
def test_a_server_that_is_killed_loses_no_job_and_makes_it_once_in_effect(program: NewProgram, pixels: str, point: str) -> None:
    assert program(point=point).run() == -signal.SIGKILL
    again = program(ahead=HOUR)
    told = again.folder / "acknowledged"
    acknowledged = told.read_text() if told.exists() else None
    assert (acknowledged is None) == (point in POINTS[:2])
    assert again.run() == 0
    job = check_the_job(again, pixels)
    assert acknowledged in (None, job.id)
    assert executions(again) == (2 if point in BEGUN else 1)


def test_a_job_that_kills_its_server_three_times_is_not_tried_again(program: NewProgram) -> None:
    for attempt in range(3):
        assert program(point="at NFE 2", ahead=attempt * HOUR).run() == -signal.SIGKILL
    assert program(point="at NFE 2", ahead=3 * HOUR).run() == 0
    assert the_job(program()).error_code == "worker_died"
    assert executions(program()) == 3


def test_a_server_that_is_told_to_end_leaves_its_job_for_the_next_to_take_at_once(program: NewProgram, pixels: str) -> None:
    assert program(point="at NFE 2", signal=signal.SIGTERM).run() == 0
    left = the_job(program())
    assert (left.status, left.attempts) == ("queued", 0)
    assert program().run() == 0  # by a clock that is not ahead
    assert check_the_job(program(), pixels).attempts == 1


def test_a_server_that_wakes_up_when_its_lease_is_over_changes_nothing(program: NewProgram, pixels: str) -> None:
    late = program(point="at NFE 2", signal=signal.SIGSTOP).start()
    assert late.pid
    try:
        until(lambda: stopped(late))
        assert program(ahead=HOUR).run() == 0
        before = check_the_job(program(), pixels)
        assert before.attempts == 2
        os.kill(late.pid, signal.SIGCONT)
        late.join(PATIENCE)
        assert late.exitcode == 0
    finally:
        late.kill()
    after = check_the_job(program(), pixels)
    assert (after.completed_at, after.lease_token) == (before.completed_at, before.lease_token)


def open_and_create(url: str, folder: Path) -> None:
    """When all are ready."""
    (folder / f"ready {os.getpid()}").touch()
    until(lambda: len(list(folder.glob("ready *"))) == 4)
    store = JobStore(url)
    store.create({}, "ann", 1)
    store.close()


def test_processes_that_open_a_new_database_at_once_make_its_tables_once(jobs_url: str, tmp_path: Path) -> None:
    processes = [PROCESSES.Process(target=open_and_create, args=(jobs_url, tmp_path)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    store = JobStore(jobs_url)
    assert store.counts() == {"queued": 4}
    store.close()


def claim_all(url: str, worker: str) -> list[str]:
    """The ids of the jobs that one process gets."""
    store, ids = JobStore(url), []
    while lease := store.claim(worker):
        ids.append(lease.job.id)
    store.close()
    return ids


def test_of_two_processes_that_want_a_job_one_gets_it(jobs_url: str) -> None:
    store = JobStore(jobs_url)
    jobs = [store.create({}, "ann", 1)[0].id for _ in range(30)]
    store.close()
    with PROCESSES.Pool(2) as processes:
        first, second = processes.starmap(claim_all, [(jobs_url, "first"), (jobs_url, "second")], chunksize=1)
    assert sorted(first + second) == sorted(jobs)


def complete(url: str, lease: Lease) -> str:
    """completed, or why not."""
    store = JobStore(url)
    try:
        return store.complete(lease, {}, Facts("00" * 32, lease.worker, 0.0, 0.0, {})).status
    except LeaseLost as lost:
        return lost.why
    finally:
        store.close()


def test_of_two_processes_that_say_they_have_made_a_job_the_last_to_take_it_is_believed(jobs_url: str) -> None:
    store = JobStore(jobs_url, lease_seconds=0.0)  # every lease is over at once
    job, _ = store.create({}, "ann", 1)
    leases = [store.claim("first"), store.claim("second")]
    with PROCESSES.Pool(2) as processes:
        said = processes.starmap(complete, [(jobs_url, lease) for lease in leases], chunksize=1)
    assert said[1] == "completed"
    assert said[0] in ("taken", "completed")
    assert store.get(job.id, "ann").fingerprint == "second"
    store.close()

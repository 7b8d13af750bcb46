"""Full disks, read-only folders, databases that are locked or down: a clear word, nothing broken, and recovery."""

import os
import resource
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from server.jobs.errors import JobsMisconfigured, StorageUnavailable, StoreUnavailable
from server.jobs.models import Job
from server.jobs.storage import LocalStorage
from server.jobs.store import JobStore
from tests.postgres import Postgres

WAIT_SECONDS = 0.2
LARGE = {"prompt": "a" * 40_000}
NOBODY = 65534


def create(store: JobStore, request: dict[str, str] | None = None) -> Job:
    return store.create(request or {"prompt": "a"}, "ann", 4)[0]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that anybody can reach; those that pytest makes are their owner's alone."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-jobs-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def without_privileges(*folders: Path) -> Iterator[None]:
    """Folders that nobody may write to, and a process that may not do what root may."""
    for folder in folders:
        for path in (folder, *folder.iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for folder in folders:
            for path in (folder, *folder.iterdir()):
                path.chmod(0o755 if path.is_dir() else 0o644)


def check_whole(database: Path) -> None:
    connection = sqlite3.connect(database)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_a_database_that_cannot_grow_is_unavailable_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "jobs.sqlite"
    store = JobStore(f"sqlite:///{file}")
    first = create(store)
    with longest_file(file.stat().st_size + 20_000):
        with pytest.raises(StoreUnavailable):
            create(store, LARGE)
        assert store.get(first.id, "ann").status == "queued"
    check_whole(file)
    second = create(store, LARGE)
    assert [job.id for job in store.page("ann").jobs] == [second.id, first.id]
    store.close()


def test_a_disk_that_takes_no_more_leaves_no_half_file_and_the_next_try_succeeds(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with longest_file(10_000), pytest.raises(StorageUnavailable, match="File too large"):
        storage.put("video_1", bytes(20_000))
    assert list((tmp_path / "video_1").iterdir()) == []
    assert storage.put("video_1", bytes(20_000))["size"] == 20_000


def mounts() -> bool:
    """Whether this machine lets us mount a small disk."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder]
        allowed = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        if allowed:
            subprocess.run(["umount", folder], check=True)
        return allowed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB of its own."""
    if not mounts():
        pytest.skip("only root may mount a small disk; a bound on the sizes of files is tested everywhere")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_takes_neither_jobs_nor_files_until_there_is_room(small_disk: Path) -> None:
    store, files = JobStore(f"sqlite:///{small_disk}/jobs.sqlite"), LocalStorage(small_disk / "files")
    job = create(store)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
    with pytest.raises(StoreUnavailable, match="full"):
        create(store, LARGE)
    with pytest.raises(StorageUnavailable, match="No space left"):
        files.put(job.id, b"clip")
    ballast.unlink()
    check_whole(small_disk / "jobs.sqlite")
    assert files.prune(job.id) == 0
    assert files.put(job.id, b"clip")["size"] == 4
    create(store)
    assert len(store.page("ann").jobs) == 2
    store.close()


def test_what_is_read_only_is_unavailable_until_it_can_be_written_to(open_folder: Path) -> None:
    url = f"sqlite:///{open_folder}/jobs/jobs.sqlite"
    store, files = JobStore(url), LocalStorage(open_folder / "files")
    job = create(store)
    store.close()
    with without_privileges(open_folder / "jobs", open_folder / "files"):
        for act in (lambda: create(store), lambda: store.claim("w"), lambda: JobStore(url)):
            with pytest.raises(StoreUnavailable):
                act()
        with pytest.raises(StorageUnavailable, match="Permission denied"):
            files.put(job.id, b"clip")
    check_whole(open_folder / "jobs/jobs.sqlite")
    assert files.put(job.id, b"clip")["size"] == 4
    lease = store.claim("w")
    assert lease
    assert lease.job.id == job.id
    store.close()


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Somebody else has the table for themselves."""
    other = JobStore(url)
    taking = "SELECT 1" if url.startswith("sqlite") else "LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"
    with other.database.engine.begin() as connection:  # on SQLite this is BEGIN IMMEDIATE: the only writer
        connection.execute(text(taking))
        yield
    other.close()


def test_a_locked_database_is_unavailable_while_it_is(jobs_url: str) -> None:
    store = JobStore(jobs_url, wait_seconds=WAIT_SECONDS)
    job = create(store)
    with locked(jobs_url):
        for act in (lambda: create(store), lambda: store.claim("w"), lambda: store.cancel(job.id, "ann")):
            with pytest.raises(StoreUnavailable, match=r"lock"):
                act()
    assert store.counts() == {"queued": 1}
    assert store.cancel(job.id, "ann").error_code == "cancelled"
    store.close()


def test_readers_of_sqlite_wait_for_no_writer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    store = JobStore(url, wait_seconds=WAIT_SECONDS)
    job = create(store)
    with locked(url):
        assert store.get(job.id, "ann").status == "queued"
        assert len(store.page("ann").jobs) == 1
    store.close()


def test_more_threads_than_connections_wait_their_turn(jobs_url: str) -> None:
    store = JobStore(jobs_url, wait_seconds=60)
    threads = [threading.Thread(target=create, args=(store,)) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts() == {"queued": 40}
    store.close()


def test_postgresql_that_is_down_is_unavailable_until_it_is_back(postgres: Postgres) -> None:
    store = JobStore(postgres.emptied())
    job = create(store)
    postgres.stop()
    try:
        for act in (lambda: create(store), lambda: store.get(job.id, "ann")):
            with pytest.raises(StoreUnavailable):
                act()
    finally:
        postgres.start()
    assert [one.id for one in store.page("ann").jobs] == [job.id]
    assert create(store).number > job.number
    store.close()


def test_a_connection_that_the_server_has_ended_is_replaced(postgres: Postgres) -> None:
    url = postgres.emptied()
    store, other = JobStore(url), JobStore(url)
    job = create(store)
    with other.database.writing() as (session, _):
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        session.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
    assert store.get(job.id, "ann").id == job.id
    store.close()
    other.close()


def test_a_process_that_is_stopped_in_a_transaction_loses_its_locks(postgres: Postgres) -> None:
    url = postgres.emptied()
    slow, store = JobStore(url, wait_seconds=WAIT_SECONDS), JobStore(url)
    job = create(store)
    session = slow.database.engine.connect()
    session.execute(text("SELECT * FROM jobs FOR UPDATE"))
    assert store.cancel(job.id, "ann").status == "failed"  # waits, but not for ever
    with pytest.raises(DBAPIError, match="idle-in-transaction"):
        session.execute(text("UPDATE jobs SET status = 'queued'"))
    session.close()
    assert store.get(job.id, "ann").status == "failed"
    slow.close()
    store.close()


def test_what_is_no_database_is_unavailable_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"this is a text\n" * 1000)
    with pytest.raises(StoreUnavailable, match="not a database"):
        JobStore(f"sqlite:///{tmp_path}/jobs.sqlite")


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///:memory:", "mysql://me:hidden@host/jobs", "postgresql+pg8000://me:hidden@host/x", "nonsense"],
)
def test_a_url_that_cannot_be_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(JobsMisconfigured, match="legal are sqlite:///FOLDER/FILE") as refused:
        JobStore(url)
    assert "hidden" not in str(refused.value)


def test_tables_of_another_version_are_left_alone(jobs_url: str) -> None:
    store = JobStore(jobs_url)
    with store.database.writing() as (session, _):
        session.execute(text("UPDATE schema_version SET version = 99"))
    store.close()
    with pytest.raises(JobsMisconfigured, match="version 99 of the tables and this fewstep wants 1"):
        JobStore(jobs_url)

"""The store of jobs, on SQLite and PostgreSQL: every step of the diagram, and none beside it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, Literal

import pytest

from server.jobs.errors import IdempotencyConflict, LeaseLost, NoSuchJob
from server.jobs.models import Facts, Job, Lease, StoredFile
from server.jobs.storage import LocalStorage
from server.jobs.store import FORGET_SECONDS, JobStore
from tests.fakes import FakeClock

REQUEST = {"prompt": "a red circle moves left", "seed": 2**64 - 1}
FILES: dict[str, StoredFile] = {"video": {"sha256": "ab" * 32, "size": 5}, "thumbnail": {"sha256": "cd" * 32, "size": 2}}
FACTS = Facts("ef" * 32, "fp-1", 1.5, 200.0, {"steps": [1.0, 2.0]})


def create(store: JobStore, owner: str = "ann", **given: Any) -> Job:
    return store.create(REQUEST, owner, 4, **given)[0]


def complete(store: JobStore, lease: Lease) -> Job:
    return store.complete(lease, FILES, FACTS)


def fail(store: JobStore, lease: Lease) -> Job:
    return store.fail(lease, "internal_error", "internal error")


def test_a_job_is_read_back_as_it_was_made(store: JobStore) -> None:
    strange = {"prompt": "nul \x00, lone \ud800, \u202eright to left, \U0001f600", "seed": 2**64 - 1, "guidance_scale": None}
    job, new = store.create(strange, "ann", 4)
    again = store.get(job.id, "ann")
    assert new
    assert (again.request, again.status, again.nfe, again.progress, again.files) == (strange, "queued", 4, 0, {})
    assert again.created_at == job.created_at == again.available_at


def test_what_one_store_made_another_finds(store: JobStore, jobs_url: str) -> None:
    job = create(store)
    other = JobStore(jobs_url)
    assert other.get(job.id, "ann").request == REQUEST
    other.close()


def test_nobody_reaches_the_job_of_another_owner(store: JobStore) -> None:
    job = create(store, "ann")
    for act in (store.get, store.cancel, store.delete):
        with pytest.raises(NoSuchJob):
            act(job.id, "bob")
    with pytest.raises(NoSuchJob):
        store.page("bob", after=job.id)
    assert store.page("bob").jobs == []
    assert store.get(job.id, "ann").status == "queued"


@pytest.mark.parametrize("order", ["desc", "asc"])
def test_pages_hold_every_job_once_in_order_whatever_is_added_meanwhile(store: JobStore, order: Literal["asc", "desc"]) -> None:
    ids = [create(store).id for _ in range(7)]
    seen: list[str] = []
    more = True
    while more:
        page = store.page("ann", seen[-1] if seen else None, 2, order)
        seen, more = seen + [job.id for job in page.jobs], page.has_more
        create(store, "ann" if order == "desc" else "bob")
    assert seen == (ids[::-1] if order == "desc" else ids)


def test_the_cursor_of_a_deleted_job_is_good(store: JobStore) -> None:
    ids = [create(store).id for _ in range(4)]
    store.delete(ids[2], "ann")
    assert [job.id for job in store.page("ann", ids[2]).jobs] == [ids[1], ids[0]]


def test_an_idempotency_key_stands_for_one_job_of_one_owner_and_one_body(store: JobStore) -> None:
    job, new = store.create(REQUEST, "ann", 4, "key", "body")
    again, anew = store.create(REQUEST, "ann", 4, "key", "body")
    assert (new, anew, again.id) == (True, False, job.id)
    with pytest.raises(IdempotencyConflict):
        store.create(REQUEST, "ann", 4, "key", "another body")
    assert store.create(REQUEST, "bob", 4, "key", "another body")[1]
    assert len(store.page("ann").jobs) == 1
    with pytest.raises(ValueError, match="1 to 255 characters, got 256"):
        store.create(REQUEST, "ann", 4, "k" * 256, "body")


def test_one_key_sent_100_times_at_once_makes_one_job(jobs_url: str) -> None:
    store, together = JobStore(jobs_url, wait_seconds=60), Barrier(100)

    def send(number: int) -> tuple[Job, bool]:
        store.counts()  # so that the connections are open by then
        together.wait()
        return store.create(REQUEST, "ann", 4, "key", "body")

    with ThreadPoolExecutor(100) as threads:
        made = list(threads.map(send, range(100)))
    assert len({job.id for job, _ in made}) == 1
    assert sum(new for _, new in made) == 1
    assert store.counts() == {"queued": 1}
    store.close()


def test_owners_take_turns_and_the_jobs_of_each_go_in_their_order(store: JobStore, clock: FakeClock) -> None:
    flood = [create(store, "ann").id for _ in range(3)]
    others = [create(store, "bob").id, create(store, "cat").id, create(store, "bob").id]
    taken = []
    clock.now += 1
    while lease := store.claim("w"):
        clock.now += 1
        taken.append(lease.job.id)
        fail(store, lease)
    assert taken == [flood[0], others[0], others[1], flood[1], others[2], flood[2]]


def test_a_job_goes_from_claim_to_completion(store: JobStore, clock: FakeClock) -> None:
    job = create(store)
    clock.now += 1
    lease = store.claim("w")
    assert lease
    assert (lease.job.id, lease.job.request, lease.job.attempts) == (job.id, REQUEST, 1)
    assert store.claim("other") is None
    store.heartbeat(lease, 2)
    assert (store.get(job.id, "ann").status, store.get(job.id, "ann").progress) == ("in_progress", 50)
    clock.now += 1
    complete(store, lease)
    done = store.get(job.id, "ann")
    assert (done.status, done.progress, done.files, done.error_code) == ("completed", 100, FILES, None)
    assert {name: getattr(done, name) for name in vars(FACTS)} == vars(FACTS)
    assert (done.created_at, done.started_at, done.completed_at, done.expires_at) == (0.0, 1.0, 2.0, 102.0)
    assert store.claim("w") is None


def test_heartbeats_keep_a_lease_and_silence_loses_it(store: JobStore, clock: FakeClock) -> None:
    create(store)
    first = store.claim("first")
    assert first
    for _ in range(3):
        clock.now += 9
        store.heartbeat(first)
        assert store.claim("second") is None
    clock.now += 10
    second = store.claim("second")
    assert second
    assert second.token > first.token
    for write in (JobStore.heartbeat, JobStore.release, complete, fail):
        with pytest.raises(LeaseLost) as lost:
            write(store, first)
        assert lost.value.why == "taken"
    complete(store, second)


def test_a_lease_that_is_over_but_was_not_taken_still_completes(store: JobStore, clock: FakeClock) -> None:
    create(store)
    lease = store.claim("w")
    assert lease
    clock.now += 1000
    assert complete(store, lease).status == "completed"


def test_a_job_that_ends_its_worker_three_times_fails(store: JobStore, clock: FakeClock) -> None:
    job, neighbour = create(store), create(store)
    for attempt in (1, 2, 3):
        lease = store.claim("w")
        assert lease
        assert (lease.job.id, lease.job.attempts) == (job.id, attempt)
        clock.now += 10
    lease = store.claim("w")
    assert lease
    assert lease.job.id == neighbour.id
    failed = store.get(job.id, "ann")
    assert (failed.status, failed.error_code, failed.expires_at) == ("failed", "worker_died", 130.0)


def test_a_released_job_is_taken_up_at_once_and_has_lost_no_attempt(store: JobStore) -> None:
    create(store)
    for _ in range(5):
        lease = store.claim("w")
        assert lease
        assert lease.job.attempts == 1
        store.heartbeat(lease, 3)
        released = store.release(lease)
        assert (released.status, released.executed_nfe) == ("queued", 0)


def test_an_attempt_that_counts_is_tried_again_after_a_pause_and_not_for_ever(store: JobStore, clock: FakeClock) -> None:
    job = create(store)
    for _ in range(3):
        lease = store.claim("w")
        assert lease
        store.release(lease, pause_seconds=5, counts=True)
        clock.now += 4.5
        assert store.claim("w") is None
        clock.now += 0.5
    assert (store.get(job.id, "ann").status, store.get(job.id, "ann").error_code) == ("failed", "worker_died")


@pytest.mark.parametrize("running", [False, True])
def test_a_cancelled_job_has_failed_at_once_and_its_worker_hears_of_it(store: JobStore, running: bool) -> None:
    job = create(store)
    lease = store.claim("w") if running else None
    cancelled = store.cancel(job.id, "ann")
    assert (cancelled.status, cancelled.error_code) == ("failed", "cancelled")
    assert store.claim("w") is None
    if lease:
        with pytest.raises(LeaseLost) as lost:
            store.heartbeat(lease, 1)
        assert lost.value.why == "cancelled"
        with pytest.raises(LeaseLost):
            complete(store, lease)
    assert store.get(job.id, "ann").files == {}


def test_cancelling_a_job_that_has_ended_changes_nothing(store: JobStore) -> None:
    job = create(store)
    lease = store.claim("w")
    assert lease
    complete(store, lease)
    assert store.cancel(job.id, "ann").status == "completed"
    assert store.get(job.id, "ann").files == FILES


def test_a_deleted_job_is_gone_with_its_prompt_and_frees_its_key(store: JobStore) -> None:
    job = create(store, idempotency_key="key", body_sha256="body")
    lease = store.claim("w")
    assert lease
    store.delete(job.id, "ann")
    for act in (store.get, store.cancel, store.delete):
        with pytest.raises(NoSuchJob):
            act(job.id, "ann")
    with pytest.raises(LeaseLost) as lost:
        store.heartbeat(lease, 1)
    assert lost.value.why == "deleted"
    assert store.kept([job.id]) == {job.id: frozenset()}
    assert store.create(REQUEST, "ann", 4, "key", "another body")[1]


def test_files_expire_first_and_the_job_much_later(store: JobStore, clock: FakeClock) -> None:
    job, failed = create(store), create(store)
    for end in (complete, fail):
        lease = store.claim("w")
        assert lease
        end(store, lease)
    digests = frozenset(file["sha256"] for file in FILES.values())
    clock.now += 99
    assert store.expire() == 0
    assert not store.get(job.id, "ann").expired(clock.now)
    assert store.kept([job.id, "video_unknown"]) == {job.id: digests}
    clock.now += 1
    assert store.get(job.id, "ann").expired(clock.now)
    assert (store.expire(), store.expire()) == (1, 0)
    late = store.get(job.id, "ann")
    assert (late.status, late.files, late.expired(clock.now)) == ("completed", {}, True)
    assert store.kept([job.id, failed.id]) == {job.id: frozenset(), failed.id: frozenset()}
    clock.now += FORGET_SECONDS
    store.expire()
    with pytest.raises(NoSuchJob):
        store.get(job.id, "ann")
    assert store.counts() == {}


def test_a_job_that_has_not_ended_keeps_all_its_files(store: JobStore) -> None:
    waiting = create(store)
    assert store.kept([waiting.id]) == {waiting.id: None}
    store.claim("w")
    assert store.kept([waiting.id]) == {waiting.id: None}


def test_the_work_ahead_of_a_job_is_told_in_nfe(store: JobStore) -> None:
    first, second, third = create(store), create(store, "bob"), create(store)
    assert [store.ahead(job) for job in (first, second, third)] == [0, 4, 8]
    lease = store.claim("w")
    assert lease
    store.heartbeat(lease, 3)
    assert [store.ahead(job) for job in (second, third)] == [1, 5]
    store.cancel(second.id, "bob")
    assert store.ahead(third) == 1
    assert store.counts() == {"in_progress": 1, "failed": 1, "queued": 1}
    assert store.counts("bob") == {"failed": 1}


def test_without_a_clock_of_the_tests_time_is_the_databases(jobs_url: str) -> None:
    store = JobStore(jobs_url)
    a, b = create(store), create(store)
    assert 1.7e9 < a.created_at <= b.created_at
    store.close()


def test_prompts_and_clips_are_their_owners_alone_on_disk(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    store, files = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite"), LocalStorage(tmp_path / "files")
    files.put(create(store).id, b"clip")
    paths = [path for path in tmp_path.rglob("*")]
    assert {"jobs.sqlite", "jobs.sqlite-wal", "files"} <= {path.name for path in paths}
    assert [path.name for path in paths if path.stat().st_mode & 0o077] == []
    store.close()

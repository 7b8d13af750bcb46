"""Random histories of the store against a model of it: ends are ends, and of all leases on a job the last one alone counts."""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from server.jobs.errors import IdempotencyConflict, LeaseLost, NoSuchJob
from server.jobs.models import Facts, Lease
from server.jobs.store import JobStore
from tests.fakes import FakeClock

LEASE_SECONDS, ATTEMPTS = 10.0, 2
FACTS = Facts("ef" * 32, "fp-1", 1.5, 200.0, {})
OWNERS = st.sampled_from(["ann", "bob"])


@dataclass
class Expected:
    """What is known of a job without asking the store."""

    owner: str
    status: str = "queued"
    attempts: int = 0
    available_at: float = 0.0
    lease: Lease | None = None  # the one that counts
    history: list[str] = field(default_factory=lambda: ["queued"])

    def become(self, status: str) -> None:
        self.status, self.lease = status, None
        self.history.append(status)


class Histories(RuleBasedStateMachine):
    """Owners, workers and time in any order."""

    jobs, leases = Bundle("jobs"), Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fewstep-jobs-"))
        self.clock = FakeClock()
        self.store = JobStore(f"sqlite:///{self.folder}/jobs.sqlite", LEASE_SECONDS, ATTEMPTS, clock=self.clock)
        self.expected: dict[str, Expected] = {}
        self.keys: dict[tuple[str, str], tuple[str, str]] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(target=jobs, owner=OWNERS)
    def create(self, owner: str) -> str:
        job, new = self.store.create({}, owner, 4)
        assert new
        self.expected[job.id] = Expected(owner, available_at=self.clock.now)
        return job.id

    @rule(owner=OWNERS, key=st.sampled_from("kl"), body=st.sampled_from("xy"))
    def create_with_a_key(self, owner: str, key: str, body: str) -> None:
        known = self.keys.get((owner, key))
        if known and self.expected[known[0]].status != "deleted":
            if known[1] != body:
                with pytest.raises(IdempotencyConflict):
                    self.store.create({}, owner, 4, key, body)
                return
            job, new = self.store.create({}, owner, 4, key, body)
            assert (job.id, new) == (known[0], False)
            return
        job, new = self.store.create({}, owner, 4, key, body)
        assert new
        self.keys[owner, key] = job.id, body
        self.expected[job.id] = Expected(owner, available_at=self.clock.now)

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(target=leases, worker=st.sampled_from(["v", "w"]))
    def claim(self, worker: str) -> Lease | None:
        lease = self.store.claim(worker)
        for job_id, job in self.expected.items():
            over = job.status in ("queued", "in_progress") and job.available_at <= self.clock.now
            if over and job.attempts >= ATTEMPTS and self.store.get(job_id, job.owner).status == "failed":
                job.become("failed")
            elif lease is None:
                assert not over
        if lease:
            job = self.expected[lease.job.id]
            assert job.status in ("queued", "in_progress")
            assert job.available_at <= self.clock.now
            assert job.attempts < ATTEMPTS
            job.become("in_progress")
            job.lease, job.attempts, job.available_at = lease, job.attempts + 1, self.clock.now + LEASE_SECONDS
        return lease

    def write(self, lease: Lease | None, method: Any, *args: Any) -> Expected | None:
        """Whether a lease's write is taken must be as the model says; the job, if it is."""
        if lease is None:
            return None
        job = self.expected[lease.job.id]
        if job.lease is not lease:
            with pytest.raises(LeaseLost):
                method(lease, *args)
            return None
        method(lease, *args)
        return job

    @rule(lease=leases, executed=st.integers(0, 5))
    def heartbeat(self, lease: Lease | None, executed: int) -> None:
        if job := self.write(lease, self.store.heartbeat, executed):
            job.available_at = self.clock.now + LEASE_SECONDS

    @rule(lease=leases)
    def complete(self, lease: Lease | None) -> None:
        if job := self.write(lease, self.store.complete, {}, FACTS):
            job.become("completed")

    @rule(lease=consumes(leases))
    def fail(self, lease: Lease | None) -> None:
        if job := self.write(lease, self.store.fail, "code", "message"):
            job.become("failed")

    @rule(lease=leases, pause=st.sampled_from([0.0, 5.0]), counts=st.booleans())
    def release(self, lease: Lease | None, pause: float, counts: bool) -> None:
        if job := self.write(lease, self.store.release, pause, counts):
            job.become("failed" if counts and job.attempts >= ATTEMPTS else "queued")
            job.attempts -= not counts
            job.available_at = self.clock.now + pause

    @rule(job_id=jobs, owner=OWNERS)
    def cancel(self, job_id: str, owner: str) -> None:
        job = self.expected[job_id]
        if owner != job.owner or job.status == "deleted":
            with pytest.raises(NoSuchJob):
                self.store.cancel(job_id, owner)
            return
        assert self.store.cancel(job_id, owner).ended
        if job.status in ("queued", "in_progress"):
            job.become("failed")

    @rule(job_id=jobs, owner=OWNERS)
    def delete(self, job_id: str, owner: str) -> None:
        job = self.expected[job_id]
        if owner != job.owner or job.status == "deleted":
            with pytest.raises(NoSuchJob):
                self.store.delete(job_id, owner)
            return
        self.store.delete(job_id, owner)
        job.become("deleted")

    @invariant()
    def the_store_is_as_expected(self) -> None:
        for owner in ("ann", "bob"):
            found = {job.id: job for job in self.store.page(owner, limit=1000).jobs}
            visible = {name: job for name, job in self.expected.items() if job.owner == owner and job.status != "deleted"}
            assert {name: job.status for name, job in found.items()} == {name: job.status for name, job in visible.items()}
            assert {name: job.attempts for name, job in found.items()} == {name: job.attempts for name, job in visible.items()}
            assert all(job.ended == (job.available_at is None) == (job.expires_at is not None) for job in found.values())

    @invariant()
    def nothing_follows_an_end_but_deletion(self) -> None:
        for job in self.expected.values():
            ends = [status for status in job.history if status in ("completed", "failed", "deleted")]
            assert ends in ([], ["completed"], ["failed"], ["deleted"], ["completed", "deleted"], ["failed", "deleted"])


def test_every_history_keeps_to_the_diagram() -> None:
    bounds = settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Histories, settings=bounds)

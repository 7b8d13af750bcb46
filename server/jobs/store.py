"""The jobs and their only way from state to state; see the diagram in server/jobs/__init__.py.

Every method is one transaction: it locks the job's row, looks whether the step is legal, and takes it. Methods block; on an
event loop they are called with `beside` (server/jobs/threads.py).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from sqlalchemy import Text, cast, delete, func, select
from sqlalchemy.orm import Session

from server.jobs.database import WAIT_SECONDS, Database
from server.jobs.errors import IdempotencyConflict, LeaseLost, NoSuchJob
from server.jobs.models import ENDS, Facts, Job, Lease, Page, Status, StoredFile, Work, new_id
from server.jobs.queries import keyed, next_available, of_owner, open_work

FORGET_SECONDS = 30 * 86_400  # for which the row of a job outlives its files, so that its owner is told 410
LONGEST_KEY = 255  # characters of an idempotency key


class JobStore:
    """All jobs of all owners. Any number of threads, processes and machines may share one database."""

    def __init__(
        self,
        url: str,
        lease_seconds: float = 30.0,
        attempts: int = 3,
        expiry_seconds: float = 86_400.0,
        clock: Callable[[], float] | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """url: sqlite:///FILE or postgresql://...; lease_seconds: after which a silent worker is taken for dead; attempts: that
        a job gets; expiry_seconds: for which files are kept; clock: see Database; wait_seconds: for locks and connections.
        Raises as Database does."""
        self.database = Database(url, clock, wait_seconds)
        self.lease_seconds, self.attempts, self.expiry_seconds = lease_seconds, attempts, expiry_seconds

    def create(
        self,
        request: Mapping[str, Any],
        owner: str,
        nfe: int,
        idempotency_key: str | None = None,
        body_sha256: str | None = None,
        admit: Callable[[dict[str, Work]], None] | None = None,
    ) -> tuple[Job, bool]:
        """A new job that is on disk, and True; or the one that this owner made with this key before, and False.

        nfe: evaluations that it will take, at least 1; body_sha256: of what was sent with the key; admit: hears what waits, by
        owner, and may raise to refuse a new job, while no other is made. Raises IdempotencyConflict, or ValueError for a key
        that is empty or too long."""
        assert nfe >= 1
        if idempotency_key is not None and not 1 <= len(idempotency_key) <= LONGEST_KEY:
            raise ValueError(f"an idempotency key has 1 to {LONGEST_KEY} characters, got {len(idempotency_key)}")
        with self.database.writing() as (session, now):
            # So numbers become visible in their order, which pages rely on, and a key is looked for and used in one step.
            self.database.one_at_a_time(session)
            if idempotency_key is not None and (known := session.scalar(keyed(owner, idempotency_key))):
                if known.body_sha256 != body_sha256:
                    raise IdempotencyConflict("this idempotency key was sent with another body before")
                return known, False
            if admit:
                admit(open_work(session))
            job = Job(
                id=new_id(),
                owner=owner,
                status="queued",
                request=dict(request),
                idempotency_key=idempotency_key,
                body_sha256=body_sha256,
                nfe=nfe,
                files={},
                created_at=now,
                available_at=now,
            )
            session.add(job)
        return job, True

    def get(self, job_id: str, owner: str) -> Job:
        """Raises NoSuchJob."""
        with self.database.reading() as session:
            return found(session.scalar(of_owner(job_id, owner)), job_id)

    def page(self, owner: str, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc") -> Page:
        """Jobs by their creation, those behind the job `after`, at most `limit`. A cursor stays good when jobs are added, and
        when its own job is deleted. Raises NoSuchJob for a cursor that never was."""
        assert limit >= 1
        rising = order == "asc"
        query = select(Job).where(Job.owner == owner, Job.status != "deleted")
        with self.database.reading() as session:
            if after is not None:
                number = session.scalar(select(Job.number).where(Job.id == after, Job.owner == owner))
                if number is None:
                    raise NoSuchJob(after)
                query = query.where(Job.number > number if rising else Job.number < number)
            query = query.order_by(Job.number.asc() if rising else Job.number.desc()).limit(limit + 1)
            jobs = list(session.scalars(query))
        return Page(jobs[:limit], len(jobs) > limit)

    def cancel(self, job_id: str, owner: str) -> Job:
        """Ends a job as failed with the code `cancelled`, at once: its worker is fenced off and hears of it at its next
        heartbeat. A job that has ended stays as it is. Raises NoSuchJob."""
        with self.database.writing() as (session, now):
            job = found(session.scalar(of_owner(job_id, owner).with_for_update()), job_id)
            if not job.ended:
                self.end(job, "failed", now)
                job.error_code, job.error_message = "cancelled", "the job was cancelled"
        return job

    def delete(self, job_id: str, owner: str) -> None:
        """Ends a job, whatever its state, and forgets what was asked; its files are left to the sweep. Its number stays, for
        cursors. Raises NoSuchJob."""
        with self.database.writing() as (session, now):
            job = found(session.scalar(of_owner(job_id, owner).with_for_update()), job_id)
            self.end(job, "deleted", now)
            job.request, job.files, job.idempotency_key, job.body_sha256 = {}, {}, None, None

    def claim(self, worker: str) -> Lease | None:
        """The next job that nobody works on, now leased to `worker`; None when there is none. Owners take turns, and each
        one's jobs go in their order. A job whose workers have died in all its attempts ends as failed."""
        with self.database.writing() as (session, now):
            while job := session.scalar(next_available(now)):
                if job.attempts >= self.attempts:
                    self.give_up(job, now)
                    session.flush()
                    continue
                job.status, job.worker, job.started_at, job.executed_nfe = "in_progress", worker, now, 0
                job.attempts += 1
                job.lease_token += 1
                job.available_at = now + self.lease_seconds
                return Lease(job, job.lease_token, worker)
        return None

    def heartbeat(self, lease: Lease, executed_nfe: int = 0) -> None:
        """The worker is alive and has executed so many NFEs of this attempt. Raises LeaseLost: it is to stop."""
        with self.database.writing() as (session, now):
            job = leased(session, lease)
            job.available_at = now + self.lease_seconds
            job.executed_nfe = min(max(job.executed_nfe, executed_nfe), job.nfe)

    def complete(self, lease: Lease, files: Mapping[str, StoredFile], facts: Facts) -> Job:
        """Ends a job with files that are in the storage already. Raises LeaseLost."""
        with self.database.writing() as (session, now):
            job = leased(session, lease)
            self.end(job, "completed", now)
            job.completed_at, job.executed_nfe, job.files = now, job.nfe, dict(files)
            for name, value in vars(facts).items():
                setattr(job, name, value)
        return job

    def fail(self, lease: Lease, code: str, message: str) -> Job:
        """Ends a job; code and message are for its owner. Raises LeaseLost."""
        with self.database.writing() as (session, now):
            job = leased(session, lease)
            self.end(job, "failed", now)
            job.error_code, job.error_message = code, message
        return job

    def release(self, lease: Lease, pause_seconds: float = 0.0, counts: bool = False) -> Job:
        """Puts a job back into the queue, for nobody to take before pause_seconds are over. counts: whether the attempt does,
        and a job that has no more of them ends as failed. Raises LeaseLost."""
        with self.database.writing() as (session, now):
            job = leased(session, lease)
            if counts and job.attempts >= self.attempts:
                self.give_up(job, now)
                return job
            job.status, job.executed_nfe, job.available_at = "queued", 0, now + pause_seconds
            job.lease_token += 1
            job.attempts -= not counts
        return job

    def expire(self) -> int:
        """Drops what is out of date: the files of jobs past expires_at, which the sweep then finds, and much later their
        rows. Returns how many jobs have lost their files."""
        with self.database.writing() as (session, now):
            late = select(Job).where(Job.expires_at <= now, cast(Job.files, Text) != "{}").with_for_update(skip_locked=True)
            jobs = session.scalars(late).all()
            for job in jobs:
                job.files = {}
            session.execute(delete(Job).where(Job.expires_at <= now - FORGET_SECONDS))
        return len(jobs)

    def kept(self, job_ids: Iterable[str]) -> dict[str, frozenset[str] | None]:
        """By job: the digests that it refers to, for good; None for a job that has not ended and may yet refer to any."""
        with self.database.reading() as session:
            rows = session.execute(select(Job.id, Job.status, Job.files).where(Job.id.in_(list(job_ids)))).all()
        digests = {job_id: frozenset(file["sha256"] for file in files.values()) for job_id, _, files in rows}
        return {job_id: digests[job_id] if status in ENDS else None for job_id, status, _ in rows}

    def ahead(self, job: Job) -> int:
        """NFEs of all owners that are to be executed before those of `job`, were all jobs made in the order of creation."""
        rest = func.coalesce(func.sum(Job.nfe - Job.executed_nfe), 0)
        with self.database.reading() as session:
            return session.scalar(select(rest).where(Job.available_at.is_not(None), Job.number < job.number)) or 0

    def waiting(self) -> dict[str, Work]:
        """What is yet to be done, by owner."""
        with self.database.reading() as session:
            return open_work(session)

    def counts(self, owner: str | None = None) -> dict[Status, int]:
        """How many jobs there are in each state, of one owner or of all."""
        query = select(Job.status, func.count()).group_by(Job.status)
        with self.database.reading() as session:
            rows = session.execute(query if owner is None else query.where(Job.owner == owner)).all()
        return {status: count for status, count in rows}

    def failures(self) -> dict[str, int]:
        """How many jobs have failed, by code."""
        query = select(Job.error_code, func.count()).where(Job.status == "failed").group_by(Job.error_code)
        with self.database.reading() as session:
            return {str(code): count for code, count in session.execute(query)}

    def close(self) -> None:
        """Gives the connections back."""
        self.database.close()

    def end(self, job: Job, status: Status, now: float) -> None:
        """Nobody takes an ended job, and nobody who had it may write to it."""
        job.status, job.available_at, job.expires_at = status, None, now + self.expiry_seconds
        job.lease_token += 1

    def give_up(self, job: Job, now: float) -> None:
        self.end(job, "failed", now)
        job.error_code = "worker_died"
        job.error_message = f"the job's worker ended before the job, {job.attempts} times; it is not tried again"


def found(job: Job | None, job_id: str) -> Job:
    if job is None:
        raise NoSuchJob(job_id)
    return job


def leased(session: Session, lease: Lease) -> Job:
    """The job of a lease, locked. Raises LeaseLost when another token has been given out since."""
    job = session.scalar(select(Job).where(Job.id == lease.job.id).with_for_update())
    if job is None:
        raise LeaseLost(lease.job.id, "deleted")
    if job.lease_token != lease.token:
        ended = "cancelled" if job.error_code == "cancelled" else job.status
        raise LeaseLost(job.id, ended if job.ended else "taken")
    return job

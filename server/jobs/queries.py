"""The questions that are put to the tables of jobs."""

from typing import Any

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session, aliased

from server.jobs.models import Job, Work


def keyed(owner: str, key: str) -> Select[Job]:
    return select(Job).where(Job.owner == owner, Job.idempotency_key == key)


def of_owner(job_id: str, owner: str) -> Select[Job]:
    return select(Job).where(Job.id == job_id, Job.owner == owner, Job.status != "deleted")


def next_available(now: float) -> Select[Job]:
    """First the owner whose last start is longest ago. What another worker is taking at this moment is passed over."""
    other = aliased(Job)
    last: ColumnElement[Any] = (
        select(func.coalesce(func.max(other.started_at), 0)).where(other.owner == Job.owner).scalar_subquery()
    )
    query = select(Job).where(Job.available_at <= now).order_by(last, Job.number).limit(1)
    return query.with_for_update(skip_locked=True, of=Job)


def open_work(session: Session) -> dict[str, Work]:
    """What is yet to be done of the jobs that have not ended, by owner."""
    sums = select(Job.owner, func.count(), func.sum(Job.nfe - Job.executed_nfe)).where(Job.available_at.is_not(None))
    return {owner: Work(jobs, int(nfe)) for owner, jobs, nfe in session.execute(sums.group_by(Job.owner))}

"""The tables, for SQLite and PostgreSQL alike. A Job that was handed out is a copy that nobody keeps up to date."""

import secrets
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from sqlalchemy import JSON, BigInteger, CheckConstraint, Double, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

VERSION = 1  # of the schema; to be raised with every change of a table
Status = Literal["queued", "in_progress", "completed", "failed", "deleted"]
ENDS: frozenset[Status] = frozenset({"completed", "failed", "deleted"})
# SQLite counts on its own in columns of exactly this type alone.
Number = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """All times are seconds since 1970 on the database's clock."""

    type_annotation_map = {float: Double, dict[str, Any]: JSON}  # noqa: RUF012  # SQLAlchemy's name and kind


class StoredFile(TypedDict):
    """A finished file in the storage. sha256 in hexadecimal, which is its name there; size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Facts:
    """What is known of a clip beside its files. pixel_sha256 of the frames in hexadecimal; timings in milliseconds."""

    pixel_sha256: str
    fingerprint: str
    inference_time_s: float
    peak_memory_mb: float
    timings: dict[str, Any]


class SchemaVersion(Base):
    """One row."""

    __tablename__ = "schema_version"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Job(Base):
    """One clip that somebody asked for."""

    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(Number, primary_key=True)  # rises in the order of creation; never given twice
    id: Mapped[str] = mapped_column(String(38), unique=True)
    owner: Mapped[str] = mapped_column(Text)  # a key's name, "" without keys
    status: Mapped[Status] = mapped_column(String(16))
    request: Mapped[dict[str, Any]]  # as the gateway understood it; {} once deleted
    idempotency_key: Mapped[str | None] = mapped_column(Text)
    body_sha256: Mapped[str | None] = mapped_column(String(64))

    nfe: Mapped[int]  # that it takes in all
    executed_nfe: Mapped[int] = mapped_column(default=0)

    attempts: Mapped[int] = mapped_column(default=0)  # begun ones that count: drained workers and full disks do not
    worker: Mapped[str | None] = mapped_column(Text)  # who has it, or had it last
    lease_token: Mapped[int] = mapped_column(default=0)  # rises with every change of hands; writers name the last one
    # When a worker may take it: a queued job at once or after a pause, a running one when its lease is over; None at its end.
    available_at: Mapped[float | None]

    created_at: Mapped[float]
    started_at: Mapped[float | None]  # the last attempt
    completed_at: Mapped[float | None]  # None unless completed
    expires_at: Mapped[float | None]  # None before its end

    error_code: Mapped[str | None] = mapped_column(Text)
    error_message: Mapped[str | None] = mapped_column(Text)

    files: Mapped[dict[str, Any]]  # variant ("video", "thumbnail") -> StoredFile; {} unless completed, and once expired
    pixel_sha256: Mapped[str | None] = mapped_column(String(64))
    fingerprint: Mapped[str | None] = mapped_column(Text)
    inference_time_s: Mapped[float | None]
    peak_memory_mb: Mapped[float | None]
    timings: Mapped[dict[str, Any] | None]

    __table_args__ = (
        UniqueConstraint("owner", "idempotency_key"),
        CheckConstraint(f"status IN {get_args(Status)}", "known_status"),
        CheckConstraint("(available_at IS NULL) = (status IN ('completed', 'failed', 'deleted'))", "open_or_ended"),
        Index("jobs_available_at", "available_at"),
        Index("jobs_owner_number", "owner", "number"),
        Index("jobs_owner_started_at", "owner", "started_at"),
        Index("jobs_expires_at", "expires_at"),
        {"sqlite_autoincrement": True},
    )

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.status}>"

    @property
    def progress(self) -> int:
        """Percent of the NFEs that have been executed; 100 only for a completed job."""
        return 100 if self.status == "completed" else min(99, 100 * self.executed_nfe // self.nfe)

    @property
    def ended(self) -> bool:
        return self.status in ENDS

    def expired(self, now: float) -> bool:
        """Whether its files are no longer to be had, be they swept already or not."""
        return self.status == "completed" and self.expires_at is not None and self.expires_at <= now


@dataclass(frozen=True)
class Lease:
    """A worker's right to a job, good while `token` is the job's last one. job: as it was taken."""

    job: Job
    token: int
    worker: str


@dataclass(frozen=True)
class Work:
    """So many jobs, and NFEs that they have yet to execute."""

    jobs: int
    nfe: int


@dataclass(frozen=True)
class Page:
    """A part of a list. has_more: whether the list goes on after it."""

    jobs: list[Job]
    has_more: bool


def new_id() -> str:
    """128 random bits, which nobody guesses."""
    return f"video_{secrets.token_hex(16)}"

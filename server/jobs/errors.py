"""What can go wrong with jobs.

JobsError
├── JobsMisconfigured    the database or the storage cannot be used as it was named: one line for the terminal
├── Unavailable          not now: 503, worth retrying after `retry_after` seconds
│   ├── StoreUnavailable     the database is locked, full, read-only or down
│   └── StorageUnavailable   the files' folder or bucket is full, read-only or down
├── NoSuchJob            there is none, or it is another owner's: 404
├── NoSuchFile           a job's file is not in the storage
├── IdempotencyConflict  the key was used with another body: 409
├── LeaseLost            the worker that writes no longer holds the job
├── JobFailed            the job cannot be made, now or later: it ends as failed
└── TryAgain             what was making the job has died: it goes back to the queue, and the attempt counts
"""


class JobsError(Exception):
    """Base of what goes wrong with jobs."""


class JobsMisconfigured(JobsError):
    """The message is one line, says the way out and holds no password."""


class Unavailable(JobsError):
    """Nothing was changed, and what is there is whole; `retry_after` is in seconds."""

    retry_after = 5


class StoreUnavailable(Unavailable):
    """The database does not take or give anything now."""


class StorageUnavailable(Unavailable):
    """The storage of files does not take or give anything now."""


class NoSuchJob(JobsError):
    """Also of jobs that are somebody else's, so that nobody learns of them."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no such job: {job_id!a:.80}")


class NoSuchFile(JobsError):
    """What a job refers to is gone from the storage."""


class IdempotencyConflict(JobsError):
    """An idempotency key stands for one body."""


class LeaseLost(JobsError):
    """`why` is cancelled, deleted, completed, failed, or taken (the job is queued again, or another worker has it)."""

    def __init__(self, job_id: str, why: str) -> None:
        super().__init__(f"the lease on {job_id} is no longer held: {why}")
        self.why = why


class JobFailed(JobsError):
    """code and message are for the job's owner."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class TryAgain(JobsError):
    """The message is for the log."""

"""What nobody will ask for any more goes away, in the background and by itself."""

import asyncio
import logging

from server.jobs.storage import Storage
from server.jobs.store import JobStore
from server.jobs.threads import beside

logger = logging.getLogger("fewstep")

BATCH = 500  # jobs that are asked about at a time
PERIOD_SECONDS = 300.0


async def keep_sweeping(store: JobStore, storage: Storage, period_seconds: float = PERIOD_SECONDS) -> None:
    """For ever; to be cancelled. Any number of processes may do so at once."""
    while True:
        try:
            await beside(sweep, store, storage)
        except Exception as error:  # whatever it is, the next sweep may go well
            logger.error("expired jobs stay for now: %s: %s", type(error).__name__, error)
        await asyncio.sleep(period_seconds)


def sweep(store: JobStore, storage: Storage) -> int:
    """Expires jobs, then deletes the files that no job refers to or may yet refer to; returns how many.

    Files are looked for first and asked about then: what is written in between belongs to a job that has not ended. Those of
    jobs that this database does not know are left alone: they may be another's.
    """
    store.expire()
    ids, deleted = list(storage.job_ids()), 0
    for begin in range(0, len(ids), BATCH):
        for job_id, keep in store.kept(ids[begin : begin + BATCH]).items():
            deleted += storage.prune(job_id, keep) if keep is not None else 0
    return deleted

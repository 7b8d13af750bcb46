"""A job as server-sent events: its state now and after every change, and the predictions on the way to it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from server.gateway.broadcast import Ear, Executed, Happened, Partial
from server.gateway.drain import Drain
from server.gateway.json_answer import to_base64
from server.gateway.media import THREADS
from server.gateway.streaming import frame
from server.gateway.video_answers import deleted, document
from server.gateway.video_jobs import VideoJobs
from server.gateway.video_media import write_animation
from server.jobs.errors import NoSuchJob
from server.jobs.models import Job
from server.jobs.threads import beside

LOOK_SECONDS = 0.25  # without word from who makes the job, after which the database is asked: that may be another process
QUIET_SECONDS = 15.0  # after which a comment is sent, so that nobody on the way takes the connection for dead
COMMENT = b": still here\n\n"


async def events(jobs: VideoJobs, drain: Drain, job_id: str, owner: str) -> AsyncIterator[bytes]:
    """From the present state to the last one; who connects again is told the present state again. Ends early with the server.

    Raises NoSuchJob or StoreUnavailable."""
    with jobs.broadcast.listening(job_id) as ear:
        state: State | None = State(await beside(jobs.store.get, job_id, owner))
        said: dict[str, Any] = {}
        spoken = time.monotonic()
        while state:
            if state.document != said:
                said, spoken = state.document, time.monotonic()
                yield frame(f"video.{state.job.status}", {"video": said})
            if state.job.ended or drain.draining:
                return
            happened = await next_of(ear)
            if isinstance(happened, Partial):
                yield await partial_image(jobs, state.job, happened)
            if time.monotonic() - spoken > QUIET_SECONDS:
                spoken = time.monotonic()
                yield COMMENT
            state = await following(jobs, state, happened)
        yield frame("video.deleted", {"video": deleted(job_id)})


@dataclass(frozen=True)
class State:
    """A job as the database had it, and how many NFEs of its present attempt were heard of since."""

    job: Job
    executed_nfe: int | None = None

    @property
    def document(self) -> dict[str, Any]:
        return document(self.job, self.executed_nfe)


async def following(jobs: VideoJobs, state: State, happened: Happened | None) -> State | None:
    """The state after what was heard; when that was nothing, or cannot be of a job that waits, the database is asked. None once
    the job is deleted."""
    executed = happened.nfe if isinstance(happened, Executed) else state.executed_nfe
    if happened and state.job.status == "in_progress":
        return State(state.job, executed)
    try:
        job = await beside(jobs.store.get, state.job.id, state.job.owner)
    except NoSuchJob:
        return None
    return State(job, executed if happened or job.lease_token == state.job.lease_token else None)


async def next_of(ear: Ear) -> Happened | None:
    """What happens next, None when nothing does for a while."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LOOK_SECONDS):
            return await ear.get()
    return None


async def partial_image(jobs: VideoJobs, job: Job, partial: Partial) -> bytes:
    """A real intermediate: as many of its first frames as are decoded at once, as an animated WebP."""
    fps = jobs.backend.students[job.request["model"]].fps
    assert fps is not None
    content = await asyncio.get_running_loop().run_in_executor(THREADS, write_animation, partial.frames, fps, "webp")
    told = {"video_id": job.id, "step": partial.step, "partial_image_index": job.request["previews"].index(partial.step)}
    more = {"b64_json": to_base64(content), "output_format": "webp", "num_frames": len(partial.frames)}
    return frame("video.partial_image", told | more)

"""One job from its plan to its files: what the workers of server/jobs are given to do."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.gateway.admission import Admission
from server.gateway.backend import (
    Backend,
    BackendTimeout,
    BackendUnavailable,
    Generated,
    InvalidRequest,
    NumericalError,
    ShuttingDown,
)
from server.gateway.broadcast import Broadcast, Executed, Partial
from server.gateway.errors import ApiError, to_api_error
from server.gateway.media import THREADS
from server.gateway.resident import watched
from server.gateway.timings import Timings, of_stages
from server.gateway.video_media import Frames, VideoFormat, thumbnail, write_video
from server.gateway.video_plan import VideoPlan, planned
from server.jobs.errors import JobFailed, TryAgain
from server.jobs.models import Facts, Job
from server.jobs.worker import OnProgress, Result
from server.metadata import pixel_sha256


@dataclass(frozen=True)
class Clip:
    """A finished video. nanoseconds of encoding; pixel_sha256 over uint8 [F, H, W, 3]; peak_memory_mb: of the processes that
    run students, megabytes of resident memory, a GPU's own not among it."""

    content: bytes
    thumbnail: bytes
    pixel_sha256: str
    generated: Generated
    nanoseconds: int
    peak_memory_mb: float

    def timings(self, total: int) -> Timings:
        """total: nanoseconds from the beginning to the end, all that is no stage is its queue."""
        return of_stages(self.generated.nanoseconds, self.nanoseconds, total)


class VideoMaker:
    """Has videos made by the backend. admission learns what they cost."""

    def __init__(self, backend: Backend, admission: Admission, broadcast: Broadcast) -> None:
        self.backend, self.admission, self.broadcast = backend, admission, broadcast
        self.running: dict[str, Callable[[], None]] = {}  # by job: has its worker ask at once whether the job is still wanted

    def look_up(self, job_id: str) -> None:
        """To be called when a job was cancelled or deleted: a worker of this process need not wait for the end of an NFE."""
        if job_id in self.running:
            self.running[job_id]()

    async def job(self, job: Job, on_progress: OnProgress) -> Result:
        """Raises JobFailed, or TryAgain for what is no fault of the job's own as far as anybody knows."""
        begin, executed = time.perf_counter_ns(), 0

        def on_step(step: int) -> None:
            nonlocal executed
            executed = step
            on_progress(step)
            self.broadcast.tell(job.id, Executed(step))

        def on_preview(step: int, frames: Frames) -> None:
            self.broadcast.tell(job.id, Partial(step, frames))

        self.running[job.id] = lambda: on_progress(executed)
        with self.broadcast.making(job.id):
            try:
                clip = await self.make(planned(job.owner, job.request, self.backend.students), "mp4", on_preview, on_step)
            except (BackendUnavailable, BackendTimeout, ShuttingDown) as error:
                raise TryAgain(str(error)) from error
            except (ApiError, InvalidRequest, NumericalError) as error:
                said = to_api_error(error)
                raise JobFailed(said.code or "invalid_value", said.message) from error
            finally:
                del self.running[job.id]
        facts = Facts(
            pixel_sha256=clip.pixel_sha256,
            fingerprint=clip.generated.fingerprint,
            inference_time_s=round(clip.generated.round_trip / 1e9, 6),
            peak_memory_mb=clip.peak_memory_mb,
            timings=clip.timings(time.perf_counter_ns() - begin).document(),
        )
        return Result({"video": clip.content, "thumbnail": clip.thumbnail}, facts)

    async def make(
        self,
        plan: VideoPlan,
        format: VideoFormat,
        on_preview: Callable[[int, Frames], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Clip:
        """Cancelling it stops the work within one NFE. Raises an EngineError or a BackendError."""
        async with watched(self.backend.processes) as memory:
            generated = await self.backend.generate(plan.request(), on_preview, on_step)
        self.admission.learn(plan, generated)
        begin, loop = time.perf_counter_ns(), asyncio.get_running_loop()
        content, small, digest = await loop.run_in_executor(THREADS, finish, plan, generated.image, format)
        return Clip(content, small, digest, generated, time.perf_counter_ns() - begin, memory.megabytes)


def finish(plan: VideoPlan, frames: Frames, format: VideoFormat) -> tuple[bytes, bytes, str]:
    """The file of a video, its thumbnail and the digest of its pixels."""
    return write_video(frames, plan.fps, format), thumbnail(frames), pixel_sha256(frames)

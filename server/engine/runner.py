"""Runs one batch on the device: an NFE, a decode, or a chunk of a video. Its members hear what came of it, and leave when they
are done or have failed; whoever is at fault fails alone."""

import logging
import time
from collections.abc import Callable
from typing import Literal

from server.engine.device import Device
from server.engine.engine import Engine
from server.engine.errors import Cancelled, EngineError
from server.engine.member import Member
from server.engine.metrics import Metrics
from server.engine.request import Pixels, Span

logger = logging.getLogger("fewstep")


class Runner:
    """For one thread, that of the NFE scheduler. members: all who are under way, also those of other batches."""

    def __init__(self, engine: Engine, lock: Device, members: list[Member], clock: Callable[[], float]) -> None:
        self.engine, self.lock, self.members, self.clock = engine, lock, members, clock
        self.just_decoded = False

    def run(self, kind: Literal["step", "decode"], batch: list[Member]) -> None:
        """Unless some of the batch are cancelled: they leave, and the next tick gives their seats to others. Nobody else is
        asked, since asking costs Triton's processes as much as a part of an NFE."""
        unwanted = [member for member in batch if wants_no_more(member)]
        for member in unwanted:
            self.fail(member, Cancelled("the request was cancelled"))
        if unwanted:
            return
        self.just_decoded = kind == "decode"
        if kind == "step":
            self.step(batch)
        elif self.engine.manifest.chunks:
            self.decode_chunk(batch[0])
        else:
            self.decode(batch)

    def step(self, batch: list[Member]) -> None:
        """One NFE; a batch that raises is run again one by one, so that only who is at fault fails."""
        progresses = [member.progress for member in batch]
        try:
            with self.lock.held():
                errors: list[EngineError | None] = [*self.engine.step(progresses)]
        except Exception as error:
            if len(batch) > 1:
                return self.one_by_one(self.step, batch, error)
            errors = [typed(error, "student_step")]
        metrics_of(batch).observe("fewstep_batch_size", len(batch), stage="student_step")
        for member, failure in zip(batch, errors, strict=True):
            if failure:
                self.fail(member, failure)
            else:
                self.stepped(member)

    def stepped(self, member: Member) -> None:
        """Counts an NFE, and keeps its x0 for the decoder if that was asked for."""
        progress, span = member.progress, member.progress.spans[-1]
        nfe, step = str(progress.request.nfe), str(progress.step)
        member.metrics.add("fewstep_steps_executed_total")
        member.metrics.observe("fewstep_step_duration_seconds", span.nanoseconds / 1e9, nfe=nfe, step=step)
        if progress.step == 1:
            waited = self.clock() - member.submitted - span.nanoseconds / 1e9
            member.metrics.observe("fewstep_queue_wait_seconds", max(waited, 0.0))
        if progress.request.tells_steps:
            tell(member.sink.stepped, progress.step)
        if progress.step in progress.request.previews:
            member.shown.append((progress.step, progress.x0))

    def decode(self, batch: list[Member]) -> None:
        """Decodes each member's oldest preview that waits, or its image."""
        progresses = [member.progress for member in batch]
        try:
            with self.lock.held():
                begin = time.perf_counter_ns()
                images = self.engine.decode(progresses[0].request.size, [member.to_decode for member in batch])
                nanoseconds = time.perf_counter_ns() - begin
        except Exception as error:
            if len(batch) > 1:
                return self.one_by_one(self.decode, batch, error)
            return self.fail(batch[0], typed(error, "vae_decoder"))
        metrics_of(batch).observe("fewstep_batch_size", len(batch), stage="vae_decoder")
        for member, image in zip(batch, images, strict=True):
            self.decoded(member, image, Span(member.decodes, begin, nanoseconds, len(batch)))

    def decode_chunk(self, member: Member) -> None:
        """Decodes a chunk of a video. A preview is its first chunk: frames that move, for the price of a part."""
        clip = member.clip = member.clip or self.engine.clip(member.progress.request.size, member.to_decode)
        try:
            with self.lock.held():
                self.engine.decode_chunk(clip)
        except Exception as error:
            return self.fail(member, typed(error, "vae_decoder"))
        if member.shown or not clip.left:
            member.clip = None
            member.metrics.observe("fewstep_batch_size", 1, stage="vae_decoder")
            self.decoded(member, clip.video, Span(member.decodes, clip.begin, clip.nanoseconds))

    def decoded(self, member: Member, image: Pixels, span: Span) -> None:
        """Sends a preview, or the image or video and with it the last word."""
        member.progress.spans.append(span)
        member.metrics.observe("fewstep_stage_duration_seconds", span.nanoseconds / 1e9, stage=span.stage)
        if member.shown:
            step, _ = member.shown.pop(0)
            member.metrics.add("fewstep_previews_total")
            tell(member.sink.preview, step, image)
        else:
            self.leave(member, "completed")
            tell(member.sink.done, self.engine.result(member.progress, image))

    def one_by_one(self, work: Callable[[list[Member]], None], batch: list[Member], error: Exception) -> None:
        """Runs a batch's members alone, after the batch raised `error`."""
        logger.warning("a batch of %d raised %s; its members are run one by one", len(batch), type(error).__name__)
        for member in batch:
            work([member])

    # --- the last word -----------------------------------------------------------------------------------------------------

    def fail(self, member: Member, error: EngineError) -> None:
        """Ends a request without an image."""
        if isinstance(error, Cancelled):
            step = member.progress.step
            member.metrics.add("fewstep_cancelled_total", at=f"nfe{step}" if step else "queue")
        self.leave(member, error.code)
        tell(member.sink.failed, error)

    def leave(self, member: Member, status: str) -> None:
        self.members.remove(member)
        member.metrics.add("fewstep_finished_total", nfe=str(member.progress.request.nfe), status=status)


def metrics_of(batch: list[Member]) -> Metrics:
    """Where a batch is counted: with the first request in it that is no probe."""
    return max(batch, key=lambda member: not member.progress.request.probe).metrics


def typed(error: Exception, stage: str) -> EngineError:
    """What a stage raised, as an error that may cross the wire."""
    return error if isinstance(error, EngineError) else EngineError(f"{stage}: {type(error).__name__}: {error}")


def tell(listener: Callable[..., None], *said: object) -> None:
    """A listener that raises loses its answer, and nothing else happens."""
    try:
        listener(*said)
    except Exception:
        logger.exception("an answer could not be delivered")


def wants_no_more(member: Member) -> bool:
    """Whether a request is cancelled; who cannot be asked is."""
    try:
        return member.sink.cancelled()
    except Exception:
        logger.exception("a request could not be asked whether it is cancelled")
        return True

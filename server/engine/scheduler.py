"""The NFE scheduler: step-level continuous batching of everything one student is asked for.

Every tick does one piece of work on the device: one NFE of a batch, one decode, or one chunk of a video. Members of a batch may
be at different steps and have different NFE counts; who arrives joins at the next NFE, who is done leaves at once. Between two
pieces of work the late are dropped, and the cancelled among those who would be worked on; images of other students may have the
device (device.py). Who goes first is said in seats.py. NFEs and decodes take turns while both have work (decodes_next).
"""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Set

from server.engine.device import Device
from server.engine.engine import Engine
from server.engine.errors import Cancelled, DeadlineExceeded, EngineError, ShuttingDown
from server.engine.member import Member, Sink
from server.engine.metrics import METRICS, MemoryMetrics, Metrics
from server.engine.request import Pixels, Request, Span
from server.engine.seats import TURN, Seats, flooding

logger = logging.getLogger("fewstep")


class Scheduler:
    """Runs one student on one device. `submit` from any thread; `run` (or `tick`) from one."""

    def __init__(
        self, engine: Engine, lock: Device, metrics: Metrics | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.engine, self.lock, self.clock = engine, lock, clock
        self.metrics = metrics or MemoryMetrics()
        for name, metric in METRICS.items():
            if metric.kind == "counter" and not metric.labels:
                self.metrics.add(name, 0)  # a counter that is there from the start shows its first rise
        self.uncounted = MemoryMetrics()  # where probes are counted, which are nobody's requests
        self.members: list[Member] = []
        self.arrivals: list[Member] = []
        self.numbers = itertools.count()
        self.news = threading.Condition()
        self.closing = False
        self.just_decoded = False
        self.gave_way = True
        self.waited: Set[Member] = set()  # those who may have waited for somebody of low priority
        self.turn = 0
        self.step_seats, self.decode_seats = Seats(), Seats()

    # --- from any thread ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, sink: Sink, seconds: float | None = None) -> None:
        """Prepares a request here, on the caller's thread, and hands it over; answers come through `sink`.

        seconds: how long the image may take from now. Raises InvalidRequest or ShuttingDown, and then `sink` hears nothing.
        """
        now = self.clock()
        deadline = math.inf if seconds is None else now + seconds
        metrics = self.uncounted if request.probe else self.metrics
        member = Member(self.engine.prepare(request), sink, deadline, next(self.numbers), now, metrics)
        with self.news:
            if self.closing:
                raise ShuttingDown("the engine is shutting down and takes no more requests")
            self.arrivals.append(member)
            metrics.add("fewstep_steps_requested_total", request.nfe)
            self.news.notify()

    def start(self) -> threading.Thread:
        """Runs the loop on a thread of its own."""
        thread = threading.Thread(target=self.run, name=f"nfe-{self.engine.manifest.name}", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Takes no more requests; the loop ends when those it has are answered."""
        with self.news:
            self.closing = True
            self.news.notify()

    # --- the loop ----------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Ticks until closed and empty. Survives whatever a tick raises: its members are failed, the rest go on."""
        while self.wait_for_work():
            try:
                self.tick()
            except Exception as error:
                logger.exception("a tick of the NFE scheduler failed")
                for member in list(self.members):
                    self.fail(member, EngineError(f"{type(error).__name__}: {error}"))

    def wait_for_work(self) -> bool:
        """False when closed and everything is answered."""
        with self.news:
            while not (self.arrivals or self.members or self.closing):
                self.news.wait()
            return bool(self.arrivals or self.members)

    def tick(self) -> None:
        """Admits, drops, and does one piece of work."""
        self.lock.stay()
        try:
            self.advance()
        finally:
            self.share_device()

    def share_device(self) -> None:
        """Lets those of low priority have the device once, unless somebody is here who was when they last had it: so nobody
        waits for more than one NFE of a video, and videos go on however many images are asked for."""
        with self.news:
            present = {*self.members, *self.arrivals}
        if self.gave_way:
            self.waited = present
        self.gave_way = self.waited.isdisjoint(present)
        if not present:
            self.lock.rest()
        elif self.gave_way:
            self.lock.give_way()

    def advance(self) -> None:
        """A tick, while nobody of low priority comes before it."""
        with self.news:
            arrived, self.arrivals = self.arrivals, []
        self.members += arrived
        self.drop_late()
        to_step = [member for member in self.members if member.progress.remaining]
        begun = [member for member in self.members if member.clip]  # at most one: of a video's state there is one at a time
        to_decode = begun or [member for member in self.members if member.shown or not member.progress.remaining]
        floods = flooding(self.members, self.engine.max_batch)
        if self.decodes_next(to_step, to_decode, floods):
            decode = self.decode_chunk if self.engine.manifest.chunks else self.decode
            self.work(decode, self.decode_seats.deal(to_decode, self.engine.max_decode_batch, floods))
        elif to_step:
            self.work(self.step, self.step_seats.deal(to_step, self.engine.max_batch, floods))
        counted = [member for member in self.members if member.metrics is self.metrics]
        self.metrics.set("fewstep_in_flight", len(counted))
        self.metrics.set("fewstep_queue_depth", sum(not member.progress.step for member in counted))

    def decodes_next(self, to_step: list[Member], to_decode: list[Member], floods: Set[str]) -> bool:
        """NFEs and decodes take turns; but where only one kind is for others than a key that floods, it goes first, all but
        every TURN-th time."""
        self.turn += 1
        if not (to_step and to_decode):
            return bool(to_decode)
        stepped, decoded = (any(one.who not in floods for one in waiting) for waiting in (to_step, to_decode))
        if stepped != decoded and self.turn % TURN:
            return decoded
        return not self.just_decoded

    def drop_late(self) -> None:
        """Between two pieces of work the late leave."""
        now = self.clock()
        for member in list(self.members):
            if now >= member.deadline:
                done = f"{member.progress.step} of {member.progress.request.nfe} NFEs"
                self.fail(member, DeadlineExceeded(f"the deadline passed after {done}"))

    def work(self, work: Callable[[list[Member]], None], batch: list[Member]) -> None:
        """Works on a batch, unless some of it are cancelled: they leave, and the next tick gives their seats to others. Nobody
        else is asked, since asking costs Triton's processes as much as a part of an NFE."""
        unwanted = [member for member in batch if wants_no_more(member)]
        for member in unwanted:
            self.fail(member, Cancelled("the request was cancelled"))
        if not unwanted:
            work(batch)

    # --- one piece of work -------------------------------------------------------------------------------------------------

    def step(self, batch: list[Member]) -> None:
        """One NFE; a batch that raises is run again one by one, so that only who is at fault fails."""
        self.just_decoded = False
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
        self.just_decoded = True
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

    def decode_chunk(self, batch: list[Member]) -> None:
        """Decodes a chunk of a video. A preview is its first chunk: frames that move, for the price of a part."""
        self.just_decoded = True
        (member,) = batch
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

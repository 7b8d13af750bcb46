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
from server.engine.errors import DeadlineExceeded, EngineError, ShuttingDown
from server.engine.member import Member, Sink
from server.engine.metrics import METRICS, MemoryMetrics, Metrics
from server.engine.request import Request
from server.engine.runner import Runner
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
        self.members: list[Member] = []  # one list for both, so it is changed in place
        self.runner = Runner(engine, lock, self.members, clock)
        self.arrivals: list[Member] = []
        self.numbers = itertools.count()
        self.news = threading.Condition()
        self.closing = False
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
                    self.runner.fail(member, EngineError(f"{type(error).__name__}: {error}"))

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
            self.runner.run("decode", self.decode_seats.deal(to_decode, self.engine.max_decode_batch, floods))
        elif to_step:
            self.runner.run("step", self.step_seats.deal(to_step, self.engine.max_batch, floods))
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
        return not self.runner.just_decoded

    def drop_late(self) -> None:
        """Between two pieces of work the late leave."""
        now = self.clock()
        for member in list(self.members):
            if now >= member.deadline:
                done = f"{member.progress.step} of {member.progress.request.nfe} NFEs"
                self.runner.fail(member, DeadlineExceeded(f"the deadline passed after {done}"))

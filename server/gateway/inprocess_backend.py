"""Students run by the engine in this process, without Triton: the same scheduler, so the same pixels."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from server.engine.device import DeviceLock, priority_of
from server.engine.engine import Determinism, Engine
from server.engine.errors import EngineError, StudentError
from server.engine.exposition import exposition
from server.engine.metrics import MemoryMetrics
from server.engine.request import Pixels, Request, Result
from server.engine.scheduler import Scheduler
from server.engine.student import student_folders
from server.engine.text import check_prompt
from server.engine.triton_config import student_parameters
from server.gateway.backend import (
    BackendFailed,
    BackendFault,
    Generated,
    GenerationRequest,
    OnPreview,
    OnStep,
    Span,
    StudentCard,
)


class InProcessBackend:
    """One scheduler and one thread per student, without process isolation."""

    def __init__(self, repository: Path, determinism: Determinism = "strict") -> None:
        self.repository, self.determinism = repository, determinism
        self.students: dict[str, StudentCard] = {}
        self.schedulers: dict[str, Scheduler] = {}
        self.metrics: dict[str, MemoryMetrics] = {}
        self.threads: list[threading.Thread] = []

    async def start(self) -> None:
        """Opens every student and lets it make an image or video. Raises BackendFailed."""
        try:
            for name, folder in student_folders(self.repository).items():
                engine = await asyncio.to_thread(Engine.open, folder, self.determinism)
                self.metrics[name] = MemoryMetrics()
                lock = DeviceLock(engine.device, priority_of(engine.manifest.media_type))
                self.schedulers[name] = Scheduler(engine, lock, self.metrics[name])
                self.threads.append(self.schedulers[name].start())
        except StudentError as error:
            raise BackendFailed(str(error)) from None
        cards = [StudentCard.parse(student_parameters(one.engine.manifest)) for one in self.schedulers.values()]
        made = {card.name: await self.generate(card.warm_up()) for card in cards}
        self.students = {card.name: card.warmed_up(made[card.name]) for card in cards}

    async def generate(
        self, request: GenerationRequest, on_preview: OnPreview | None = None, on_step: OnStep | None = None
    ) -> Generated:
        """One image or video; cancelling the task stops the work within one NFE."""
        begin = time.perf_counter_ns()
        answer = FutureSink(asyncio.get_running_loop(), on_preview, on_step)
        shared = ("prompt", "seed", "image_index", "nfe", "size", "previews", "probe", "who")
        asked = Request(**{name: getattr(request, name) for name in shared}, tells_steps=on_step is not None)
        seconds = request.timeout_ms / 1000 if request.timeout_ms else None
        try:
            await asyncio.to_thread(self.schedulers[request.student].submit, asked, answer, seconds)
            result = await answer.future
        except EngineError as error:
            raise (BackendFault(str(error)) if type(error) is EngineError else error) from None
        finally:
            answer.dropped = True
        spans = tuple(Span(span.stage, span.begin, span.nanoseconds, span.batch) for span in result.spans)
        named = {name: getattr(result, name) for name in ("tokens", "fingerprint", "fingerprint_parts")}
        return Generated(result.image, spans, **named, round_trip=time.perf_counter_ns() - begin)

    def check_prompt(self, student: str, prompt: str) -> None:
        check_prompt(prompt, self.schedulers[student].engine.text_encoder.tokenizers)

    def processes(self) -> list[int]:
        return [os.getpid()]

    async def ready(self) -> bool:
        return bool(self.students) and all(thread.is_alive() for thread in self.threads)

    async def scrape(self) -> str:
        return exposition(self.metrics)

    async def stop(self) -> None:
        """Answers what is under way first."""
        self.students = {}
        for scheduler in self.schedulers.values():
            scheduler.close()
        for thread in self.threads:
            await asyncio.to_thread(thread.join)

    def kill(self) -> None:
        """Nothing here outlives the process."""


class FutureSink:
    """Answers become a future of the event loop; see scheduler.Sink."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_preview: OnPreview | None, on_step: OnStep | None) -> None:
        self.loop, self.on_preview, self.on_step = loop, on_preview, on_step
        self.future: asyncio.Future[Result] = loop.create_future()
        self.dropped = False

    def cancelled(self) -> bool:
        return self.dropped

    def stepped(self, step: int) -> None:
        if self.on_step:
            self.loop.call_soon_threadsafe(self.on_step, step)

    def preview(self, step: int, image: Pixels) -> None:
        if self.on_preview:
            self.loop.call_soon_threadsafe(self.on_preview, step, image)

    def done(self, result: Result) -> None:
        self.loop.call_soon_threadsafe(self.settle, lambda: self.future.set_result(result))

    def failed(self, error: EngineError) -> None:
        self.loop.call_soon_threadsafe(self.settle, lambda: self.future.set_exception(error))

    def settle(self, how: Callable[[], None]) -> None:
        """On the event loop; a future that was cancelled meanwhile stays cancelled."""
        if not self.future.done():
            how()

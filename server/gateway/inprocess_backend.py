"""Students run by the engine in this process, on one thread: the fallback where there is no Triton."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from server.engine.engine import Engine, Request
from server.engine.errors import StudentError
from server.engine.student import student_folders
from server.engine.triton_config import student_parameters
from server.gateway.backend import BackendFailed, BackendImage, ImageRequest, StudentCard

Returned = TypeVar("Returned")


class InProcessBackend:
    """The same engine as in Triton, so the same pixels, without process isolation."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.students: dict[str, StudentCard] = {}
        self.engines: dict[str, Engine] = {}
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def start(self) -> None:
        """Opens every student and lets it make an image. Raises BackendFailed."""
        try:
            for name, folder in student_folders(self.repository).items():
                self.engines[name] = await self.in_thread(Engine.open, folder)
        except StudentError as error:
            raise BackendFailed(str(error)) from None
        cards = [StudentCard.parse(student_parameters(engine.manifest)) for engine in self.engines.values()]
        made = {card.name: await self.generate(card.warm_up()) for card in cards}
        self.students = {card.name: dataclasses.replace(card, fingerprint=made[card.name].fingerprint) for card in cards}

    async def generate(self, request: ImageRequest) -> BackendImage:
        """One image, when the thread is free."""
        begin = time.perf_counter_ns()
        engine = self.engines[request.student]
        asked = Request(request.prompt, request.seed, request.image_index, request.nfe, request.size)
        result = await self.in_thread(engine.run, asked)
        elapsed = time.perf_counter_ns() - begin
        return BackendImage(result.image, result.nanoseconds, result.tokens, result.fingerprint, elapsed)

    async def ready(self) -> bool:
        return bool(self.students)

    async def stop(self) -> None:
        self.students = {}
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[..., Returned], *arguments: Any) -> Returned:
        """Runs `function` on the engine's thread, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

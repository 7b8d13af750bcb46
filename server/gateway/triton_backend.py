"""Students run by a local Triton, which is watched and started again when it, or one of its stubs, dies."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx

from server.engine.errors import StudentError
from server.engine.student import open_student, student_folders
from server.gateway.backend import (
    BackendError,
    BackendFailed,
    BackendTimeout,
    BackendUnavailable,
    EngineError,
    Generated,
    GenerationRequest,
    OnPreview,
    OnStep,
    StudentCard,
)
from server.gateway.triton_client import TritonClient
from server.gateway.tritonserver import TritonServer, find_triton

logger = logging.getLogger("fewstep")

START_SECONDS = 60.0
ANSWER_SECONDS = 60.0
POLL_SECONDS = 0.1
QUIET_SECONDS = 5.0  # without a word of any student for so long, each is asked: a dead stub still says it is ready
PROBE_SECONDS = 10.0
SCRAPE_SECONDS = 2.0
LONGEST_BACKOFF = 8.0
STARTING = "the image backend is starting; send the request again"


class TritonBackend:
    """Owns the tritonserver process, its client and the task that watches both."""

    def __init__(self, repository: Path, determinism: str = "strict", cpu_threads: int = 2, provider: str = "cpu") -> None:
        self.repository = repository
        self.engine = {
            "FEWSTEP_DETERMINISM": determinism,
            "FEWSTEP_CPU_THREADS": str(cpu_threads),
            "FEWSTEP_PROVIDER": provider,
        }
        self.students: dict[str, StudentCard] = {}
        self.prompt_checks: dict[str, Callable[[str], None]] = {}  # of the students that make videos
        self.server: TritonServer | None = None
        self.client: TritonClient | None = None
        self.watcher: asyncio.Task[None] | None = None
        self.trouble = asyncio.Event()
        self.probing = asyncio.Lock()
        self.http = httpx.AsyncClient(timeout=SCRAPE_SECONDS, trust_env=False, verify=False)  # loopback, without TLS

    async def start(self) -> None:
        """Verifies the students, starts Triton and lets each make something. Raises BackendFailed."""
        installation = find_triton()
        try:
            folders = await asyncio.to_thread(student_folders, self.repository)
            for name, folder in folders.items():
                student = await asyncio.to_thread(open_student, folder)
                if student.manifest.media_type == "video":
                    # Who serves images alone needs no tokenizers in this process.
                    from server.engine.text import check_prompt, open_tokenizers

                    self.prompt_checks[name] = partial(check_prompt, tokenizers=open_tokenizers(student))
        except StudentError as error:
            raise BackendFailed(str(error)) from None
        self.installation, self.names = installation, list(folders)
        await self.start_server()
        self.watcher = asyncio.create_task(self.watch())

    async def start_server(self) -> None:
        """One run of tritonserver up to what warms its students up. Raises BackendFailed, leaving no process behind."""
        self.server = TritonServer(self.installation, self.repository, self.names, self.engine)
        client = TritonClient(self.server.port)
        try:
            async with asyncio.timeout(START_SECONDS):
                cards = [await self.card_when_loaded(client, name) for name in self.names]
                self.students = {card.name: await warm_up(client, card) for card in cards}
        except (BackendError, EngineError, TimeoutError) as error:
            why = str(error) if isinstance(error, BackendFailed) else f"no warm-up image: {error or 'too slow'}"
            await client.close()
            await self.stop_server()
            raise BackendFailed(f"Triton did not start: {why}") from None
        self.server.know_stubs()
        self.client = client

    async def card_when_loaded(self, client: TritonClient, name: str) -> StudentCard:
        """Waits for Triton to have loaded a student. Raises BackendFailed when the process ends instead."""
        while True:
            with contextlib.suppress(BackendUnavailable):
                return await client.card(name)
            if self.server is None or not self.server.alive:
                raise BackendFailed(self.server.why() if self.server else "it was stopped")
            await asyncio.sleep(POLL_SECONDS)

    async def generate(
        self, request: GenerationRequest, on_preview: OnPreview | None = None, on_step: OnStep | None = None
    ) -> Generated:
        """One image or video; a lost or silent Triton sets off a probe."""
        if self.client is None:
            raise BackendUnavailable(STARTING)
        try:
            seconds = max(ANSWER_SECONDS, (request.timeout_ms or 0) / 1000)
            return await self.client.generate(request, seconds, on_preview, on_step)
        except (BackendUnavailable, BackendTimeout):
            self.trouble.set()
            raise

    def check_prompt(self, student: str, prompt: str) -> None:
        self.prompt_checks[student](prompt)

    def processes(self) -> list[int]:
        return [self.server.process.pid, *self.server.stubs] if self.server else []

    async def ready(self) -> bool:
        """True when every student makes something now: only that shows that no stub is dead."""
        return self.server is not None and self.server.alive and await self.probe()

    async def probe(self) -> bool:
        """A real image or video from every student; a word of it meanwhile to somebody else counts as well."""
        async with self.probing:
            begin, client = time.monotonic(), self.client
            if client is None:
                return False
            for card in self.students.values():
                try:
                    await client.generate(card.warm_up(), PROBE_SECONDS)
                except (BackendError, EngineError):
                    if client.heard.get(card.name, 0.0) <= begin:
                        return False
            return True

    async def watch(self) -> None:
        """Restarts Triton whenever its process is gone or a probe fails."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.trouble.wait(), POLL_SECONDS)
            quiet = self.client is not None and time.monotonic() - max(self.client.heard.values()) > QUIET_SECONDS
            suspected = self.trouble.is_set() or quiet
            self.trouble.clear()
            if self.server is None or not self.server.alive or (suspected and not await self.probe()):
                await self.restart()

    async def restart(self) -> None:
        """Starts Triton again, waiting longer after every failure."""
        backoff = 0.5
        while True:
            logger.warning("Triton is gone or does not answer; starting it again")
            if self.server is not None:
                self.server.kill()  # it has nothing to save, and a polite end waits for its dead stub
            await self.stop_server()
            try:
                return await self.start_server()
            except BackendFailed as error:
                logger.error("%s; next try in %.1f s", error, backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF)

    async def stop_server(self) -> None:
        """Ends the process and the client; what was under way fails with BackendUnavailable."""
        client, self.client = self.client, None
        server, self.server = self.server, None
        if client is not None:
            client.hang_up()
        if server is not None:
            await asyncio.to_thread(server.stop)
        if client is not None:
            await client.close()

    async def scrape(self) -> str:
        """The answer of Triton's own metrics endpoint. Raises BackendUnavailable."""
        if self.client is None or self.server is None or not self.server.alive:
            raise BackendUnavailable(STARTING)
        try:
            answer = await self.http.get(f"http://127.0.0.1:{self.server.metrics_port}/metrics")
            return answer.raise_for_status().text
        except httpx.HTTPError:
            raise BackendUnavailable(STARTING) from None

    async def stop(self) -> None:
        """Ends the watching first, so that nothing is started again."""
        if self.watcher is not None:
            self.watcher.cancel()
            await asyncio.gather(self.watcher, return_exceptions=True)
        await self.stop_server()
        await self.http.aclose()

    def kill(self) -> None:
        if self.server is not None:
            self.server.kill_at_once()


async def warm_up(client: TritonClient, card: StudentCard) -> StudentCard:
    """Lets a student make an image or video, and learns its fingerprint from it."""
    made = await client.generate(card.warm_up(), START_SECONDS)
    return card.warmed_up(made)

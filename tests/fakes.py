"""An engine whose networks are a few lines of numpy and whose clock moves only when they run; what is around it."""

import asyncio
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from server.engine.device_runtime import Array, Program, Work
from server.engine.engine import Engine
from server.engine.errors import EngineError
from server.engine.onnx_program import OnnxProgram
from server.engine.request import Pixels, Request, Result
from server.engine.session import PROVIDER, Tensors, open_graph
from server.engine.student import Contents, open_student
from server.engine.text import TextEncoder
from server.gateway.backend import Generated, GenerationRequest, OnPreview, OnStep, Span, StudentCard

NFE_SECONDS, DECODE_SECONDS = 1.0, 2.0
NAN_SEED, RAISING_SEED = 666, 667  # requests with these seeds spoil their row, or the whole call


class FakeClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeStep:
    """Row by row: x0 = (latents + timestep) mod 1, next = latents + nfe. Latents carry the seed in their first value."""

    clock: FakeClock
    batch_invariant = True
    calls: list[list[int]] = field(default_factory=list)  # the rows' seeds, call by call
    began: list[float] = field(default_factory=list)

    def run(self, tensors: Tensors) -> list[Any]:
        seeds = [int(row.flat[0]) for row in tensors["latents"]]
        self.began.append(self.clock.now)
        self.clock.now += NFE_SECONDS
        if RAISING_SEED in seeds:
            raise RuntimeError("the runtime refuses this row")
        self.calls.append(seeds)
        latents = tensors["latents"].copy()
        latents[:, 1:] += tensors["nfe"][:, None, None, None]
        x0 = latents + tensors["timestep"][:, None, None, None]
        latents[[seed == NAN_SEED for seed in seeds]] = np.nan
        return [latents, x0]


@dataclass
class FakeDecoder:
    """Sums the channels into a flat picture."""

    clock: FakeClock
    scale: int
    batch_invariant = True
    calls: int = 0

    def run(self, tensors: Tensors) -> list[Any]:
        self.calls += 1
        self.clock.now += DECODE_SECONDS
        latents = tensors["latents"]
        colour = latents[:, 1:].sum((1, 2, 3)).astype(np.int64) % 251
        height, width = latents.shape[2] * self.scale, latents.shape[3] * self.scale
        return [np.broadcast_to(colour[:, None, None, None], (len(latents), height, width, 3)).astype(np.uint8)]


class FakeText:
    """Embeds every prompt as zeros, and counts."""

    batch_invariant = True

    def __init__(self) -> None:
        self.calls = 0

    def run(self, tensors: Tensors) -> list[Any]:
        self.calls += 1
        return [np.zeros((*tensors["tokens"].shape, 4), np.float32)]


@dataclass(frozen=True)
class FakeEngine(Engine):
    """The real engine over fake sessions; noise starts with the seed, so that a row says whose it is."""

    def prepare(self, request: Request) -> Any:
        progress = super().prepare(request)
        progress.latents = np.zeros_like(progress.latents)
        progress.latents.flat[0] = request.seed
        return progress


def fake_engine(tiny: Path, clock: FakeClock, max_batch: int = 4, fixed_batch: int | None = None) -> FakeEngine:
    """An engine with the tiny student's manifest."""
    student = open_student(tiny)
    manifest = student.manifest.model_copy(update={"max_batch": max_batch})
    sessions = {"student_step": FakeStep(clock), "vae_decoder": FakeDecoder(clock, 8), "text_encoder": FakeText()}
    text = TextEncoder.of(student, sessions["text_encoder"])
    tables = {nfe: np.array(manifest.tables[str(nfe)], np.float32) for nfe in manifest.nfe}
    return FakeEngine(manifest, text, sessions, "fp_fake", {}, tables, fixed_batch)


class FakeRuntime:
    """A device whose memory is numpy's and whose launches run the graph on onnxruntime. A "plan" is the graph itself.

    It fails where a GPU would be slow or wrong: memory asked for when the first request has come, a copy over the bus that is
    larger than `at_most`, an address nobody was given, a launch that was not prepared by running once.
    """

    device, name, capability = "cuda:0", "Fake", "8.9"

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.ran: set[int] = set()
        self.launches = 0
        self.captured = 0
        self.bus: list[tuple[str, int]] = []
        self.limit: int | None = None
        self.on_launch: list[Exception] = []

    def allocate(self, size: int) -> int:
        assert not self.launches, "memory was asked for after the warm-up"
        block = np.zeros(size, np.uint8)
        self.memory[block.ctypes.data] = block
        return block.ctypes.data

    def copy_in(self, address: int, array: Array) -> None:
        self.over_the_bus("in", array.nbytes)
        self.copy(address, array.ctypes.data, array.nbytes, known=(address,))

    def copy_out(self, array: Array, address: int) -> None:
        self.over_the_bus("out", array.nbytes)
        self.copy(array.ctypes.data, address, array.nbytes, known=(address,))

    def copy(self, target: int, source: int, size: int, known: tuple[int, ...] | None = None) -> None:
        for address in (target, source) if known is None else known:
            assert any(start <= address and address + size <= start + len(block) for start, block in self.memory.items())
        ctypes.memmove(target, source, size)

    def over_the_bus(self, way: str, size: int) -> None:
        assert self.limit is None or size <= self.limit, f"{size} bytes went {way} between two NFEs"
        self.bus.append((way, size))

    @contextmanager
    def at_most(self, size: int) -> Iterator[None]:
        """Copies between host and device are at most so large, each."""
        self.limit = size
        yield
        self.limit = None

    def capture(self, work: Work) -> Work:
        assert id(work) in self.ran, "captured before it ran once"
        self.captured += 1

        def launch() -> None:
            self.launches += 1
            if self.on_launch:
                raise self.on_launch.pop()
            work()

        return launch

    def wait(self) -> None:
        pass

    def load_onnx(self, graph: str, contents: Contents, weights: Contents | None) -> Program:
        return FakeProgram(self, graph, contents, weights, capturable=False)

    def load_plan(self, graph: str, plan: bytes, package: str) -> Program:
        return FakeProgram(self, graph, plan, None, capturable=True)


class FakeProgram(OnnxProgram):
    """The real I/O binding, on the addresses of numpy's memory."""

    def __init__(
        self, runtime: FakeRuntime, graph: str, contents: Contents, weights: Contents | None, capturable: bool
    ) -> None:
        super().__init__(graph, open_graph(graph, contents, weights, [PROVIDER]), "cpu")
        self.runtime, self.capturable = runtime, capturable
        self.kept: list[Work] = []

    def bind(self, tensors: Any) -> Work:
        run = super().bind(tensors)

        def work() -> None:
            run()
            self.runtime.ran.add(id(work))

        self.kept.append(work)  # so that no other work gets its id
        return work


class Recorder:
    """A sink that keeps what it hears."""

    def __init__(self) -> None:
        self.wanted = True
        self.asked = 0
        self.steps: list[int] = []
        self.previews: list[tuple[int, Pixels]] = []
        self.answers: list[Result | EngineError] = []

    def cancelled(self) -> bool:
        self.asked += 1
        return not self.wanted

    def stepped(self, step: int) -> None:
        assert not self.answers, "a step after the last word"
        self.steps.append(step)

    def preview(self, step: int, image: Pixels) -> None:
        assert not self.answers, "a preview after the last word"
        self.previews.append((step, image))

    def done(self, result: Result) -> None:
        self.answers.append(result)

    def failed(self, error: EngineError) -> None:
        self.answers.append(error)

    @property
    def answer(self) -> Result | EngineError:
        (only,) = self.answers
        return only


MOTION = StudentCard(
    name="motion",
    media_type="video",
    family="cogvideox",
    revision="0",
    nfe=(1, 2, 4),
    default_nfe=4,
    sizes={"64x48": [4, 8, 6, 8]},
    frames=16,
    fps=8,
    text_length=12,
    max_prompt_characters=100,
    manifest_sha256="",
    fingerprint="fp_fake",
)


class FakeVideos:
    """A backend with one student, whose videos are one colour that the seed decides. With `patient` an NFE is executed only
    when `let` allows it; `failure` is raised in its place."""

    def __init__(self, patient: bool = False) -> None:
        self.students = {"motion": MOTION}
        self.patient, self.allowed = patient, asyncio.Semaphore(0)
        self.executed: list[tuple[str, int]] = []  # prompts and the NFEs executed for them
        self.failure: Exception | None = None

    def let(self, nfe: int) -> None:
        for _ in range(nfe):
            self.allowed.release()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def ready(self) -> bool:
        return True

    async def scrape(self) -> str:
        return ""

    def check_prompt(self, student: str, prompt: str) -> None: ...

    def processes(self) -> list[int]:
        return [os.getpid()]

    def kill(self) -> None: ...

    async def generate(
        self, request: GenerationRequest, on_preview: OnPreview | None = None, on_step: OnStep | None = None
    ) -> Generated:
        width, height = map(int, request.size.split("x"))
        frames = np.full((MOTION.frames or 0, height, width, 3), request.seed % 251, np.uint8)
        spans = [Span("text_encoder", 0, 1000, 1)]
        for step in range(1, request.nfe + 1):
            await (self.allowed.acquire() if self.patient else asyncio.sleep(0))
            if self.failure:
                raise self.failure
            self.executed.append((request.prompt, step))
            spans.append(Span(f"nfe{step}", 0, 1000, 1))
            if on_step:
                on_step(step)
            if on_preview and step in request.previews:
                on_preview(step, frames[:2] // 2)
        spans.append(Span("vae_decoder", 0, 1000, 1))
        return Generated(frames, tuple(spans), 3, "fp_fake", {}, 10_000)

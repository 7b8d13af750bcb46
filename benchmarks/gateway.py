"""What HTTP and Triton cost on top of the engine, in one interleaved run on this machine.

Four ways to the same images: the engine's scheduler in this process; the gRPC stream of the Triton that `fewstep serve` has
started; that server over HTTP as bytes (`Accept: image/png`); and as base64 in JSON. At concurrency 1 the ways take turns image
by image, so that a machine that slows down for a while slows all alike; at 16 they take turns in closed loops of some seconds.
Every image has its own prompt and seed, so that no cache answers; the first image of every client is not counted.
"""

import asyncio
import json
import queue
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.server import Connection, served
from server.engine.device import FreeDevice
from server.engine.engine import Engine
from server.engine.errors import EngineError
from server.engine.fingerprint import device_class
from server.engine.request import Pixels, Request, Result
from server.engine.scheduler import Scheduler
from server.gateway.backend import GenerationRequest
from server.gateway.triton_client import TritonClient
from server.generate import open_engine

CROWD = 16
ANSWER_SECONDS = 60.0
PATH = "/v1/images/generations"
GOALS = {"gateway_ms": 3.0, "hop_ms": 2.0, "share_of_engine": 0.95}
Ask = Callable[[], Awaitable[str]]  # one image; what its Server-Timing said, if anything


@dataclass
class Samples:
    """What was measured of one way."""

    alone: list[float] = field(default_factory=list)  # milliseconds of an image at concurrency 1
    crowded: list[float] = field(default_factory=list)  # the same at concurrency CROWD
    images_per_second: list[float] = field(default_factory=list)  # of every closed loop
    stages: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # Server-Timing, concurrency 1


class Prompts:
    """Requests that nobody has made before."""

    def __init__(self, engine: Engine) -> None:
        self.student, self.number = engine.manifest.name, 0
        self.nfe, self.size = engine.manifest.default_nfe, next(iter(engine.manifest.sizes))

    def next(self) -> Request:
        self.number += 1
        return Request(f"a red circle above a blue square {self.number}", self.number, 0, self.nfe, self.size)


# --- the ways -------------------------------------------------------------------------------------------------------------


class InProcess:
    """The scheduler on its own thread; its answers come back over a queue."""

    def __init__(self, engine: Engine, prompts: Prompts) -> None:
        self.scheduler, self.prompts = Scheduler(engine, FreeDevice()), prompts
        self.scheduler.start()
        self.answers: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()

    def submit(self) -> None:
        """One request; (begin, end) will be put into `answers`."""
        begin = time.perf_counter()
        self.scheduler.submit(self.prompts.next(), Waiter(lambda: self.answers.put((begin, time.perf_counter()))))

    async def once(self, samples: Samples) -> None:
        self.submit()
        begin, end = self.answers.get()
        samples.alone.append(1000 * (end - begin))

    async def crowd(self, samples: Samples, seconds: float) -> None:
        self.fill()
        self.drain()
        start, finished = time.perf_counter(), 0
        self.fill()
        while time.perf_counter() < start + seconds:
            begin, end = self.answers.get()
            samples.crowded.append(1000 * (end - begin))
            finished += end < start + seconds
            self.submit()
        self.drain()
        samples.images_per_second.append(finished / seconds)

    def fill(self) -> None:
        for _ in range(CROWD):
            self.submit()

    def drain(self) -> None:
        for _ in range(CROWD):
            self.answers.get()


@dataclass
class Waiter:
    """A scheduler's sink that calls `then` on the last word."""

    then: Callable[[], None]

    def cancelled(self) -> bool:
        return False

    def stepped(self, step: int) -> None: ...

    def preview(self, step: int, image: Pixels) -> None: ...

    def done(self, result: Result) -> None:
        self.then()

    def failed(self, error: EngineError) -> None:
        raise error


class Remote:
    """Clients of a server; `connect` gives each of them what asks for one image."""

    def __init__(self, connect: Callable[[], Awaitable[Ask]]) -> None:
        self.connect = connect

    async def open(self) -> None:
        self.ask = await self.connect()
        await self.ask()

    async def once(self, samples: Samples) -> None:
        begin = time.perf_counter()
        timing = await self.ask()
        samples.alone.append(1000 * (time.perf_counter() - begin))
        for stage, milliseconds in re.findall(r"(\w+);dur=([0-9.]+)", timing):
            samples.stages[stage].append(float(milliseconds))

    async def crowd(self, samples: Samples, seconds: float) -> None:
        clients = [await self.connect() for _ in range(CROWD)]
        await asyncio.gather(*(ask() for ask in clients))
        start, finished = time.perf_counter(), 0

        async def loop(ask: Ask) -> None:
            nonlocal finished
            while (begin := time.perf_counter()) < start + seconds:
                await ask()
                end = time.perf_counter()
                samples.crowded.append(1000 * (end - begin))
                finished += end < start + seconds

        await asyncio.gather(*(loop(ask) for ask in clients))
        samples.images_per_second.append(finished / seconds)


def triton_stream(port: int, prompts: Prompts) -> Remote:
    """The gateway's own client, one connection for all as there, against the gateway's own Triton."""
    client = TritonClient(port)

    async def connect() -> Ask:
        await client.card(prompts.student)

        async def ask() -> str:
            one = prompts.next()
            asked = GenerationRequest(prompts.student, one.prompt, one.seed, 0, one.nfe, one.size)
            await client.generate(asked, ANSWER_SECONDS)
            return ""

        return ask

    return Remote(connect)


def http(url: str, accept: str, prompts: Prompts) -> Remote:
    """One kept connection per client."""

    async def connect() -> Ask:
        connection = await Connection.open(url)

        async def ask() -> str:
            one = prompts.next()
            asked = {"prompt": one.prompt, "seed": one.seed, "num_inference_steps": one.nfe, "model": prompts.student}
            return (await connection.post(PATH, asked, accept))["server-timing"]

        return ask

    return Remote(connect)


# --- the run --------------------------------------------------------------------------------------------------------------


def run(repository: Path, student: str | None, images: int, rounds: int, seconds: float) -> None:
    """Measures, prints what came out, and one line of JSON last. Raises EngineError."""
    engine = open_engine(repository, student)
    with served(repository) as server:
        samples = asyncio.run(measure(engine, server.url, server.triton_port, images, rounds, seconds))
    report(engine, samples, {"images": images, "rounds": rounds, "seconds": seconds})


async def measure(engine: Engine, url: str, port: int, images: int, rounds: int, seconds: float) -> dict[str, Samples]:
    """Way -> what was measured, in `rounds` rounds of `images` images alone and `seconds` of a crowd."""
    prompts = Prompts(engine)
    engine_way = InProcess(engine, prompts)
    remote = {
        "triton stream": triton_stream(port, prompts),
        "http, bytes": http(url, "image/png", prompts),
        "http, base64": http(url, "application/json", prompts),
    }
    ways: dict[str, InProcess | Remote] = {"engine": engine_way, **remote}
    samples = {name: Samples() for name in ways}
    await engine_way.once(Samples())
    for _ in tqdm(range(rounds), desc="rounds", dynamic_ncols=True):
        for client in remote.values():
            await client.open()
        for _ in range(images):
            for name, way in ways.items():
                await way.once(samples[name])
        for name, way in ways.items():
            await way.crowd(samples[name], seconds)
    return samples


def report(engine: Engine, samples: dict[str, Samples], how: dict[str, float]) -> None:
    """The table and the overheads for people, then the document."""
    rates = {name: round(float(np.median(one.images_per_second)), 2) for name, one in samples.items()}
    stages = {name: round(float(np.median(values)), 3) for name, values in samples["http, bytes"].stages.items()}
    found = overheads(samples)
    document = {
        "benchmark": "gateway",
        "student": engine.manifest.name,
        "fingerprint": engine.fingerprint,
        "device": device_class(),
        **how,
        "nfe": engine.manifest.default_nfe,
        "ms": {name: {"1": summary(one.alone), str(CROWD): summary(one.crowded)} for name, one in samples.items()},
        "images_per_second": rates,
        "server_timing_ms": stages,
        "overheads": found,
        "goals": GOALS,
    }
    print(f"{'':<16}{'alone: p50':>12}{'p99 ms':>9}{f'{CROWD} at once: p50':>20}{'p99 ms':>9}{'images/s':>10}")
    for name, one in samples.items():
        alone, crowded = summary(one.alone), summary(one.crowded)
        print(f"{name:<16}{alone['p50']:>12.2f}{alone['p99']:>9.2f}{crowded['p50']:>20.2f}{crowded['p99']:>9.2f}", end="")
        print(f"{rates[name]:>10.1f}")
    print(f"Triton's hop: {found['hop_ms']:.2f} ms at p50 over the engine (goal: at most {GOALS['hop_ms']:g})")
    for name in ("bytes", "base64"):
        print(
            f"gateway, {name}: {found[f'gateway_{name}_ms']:.2f} ms over the stream (goal: at most {GOALS['gateway_ms']:g}),",
            end="",
        )
        print(f" {stages['image_encode']:.2f} of them the PNG; {found[f'share_of_engine_{name}']:.1%} of the engine's images/s")
    print(json.dumps(document))


def overheads(samples: dict[str, Samples]) -> dict[str, float]:
    """Differences of medians at concurrency 1, milliseconds; ratios of images per second at CROWD."""
    alone = {name: float(np.median(one.alone)) for name, one in samples.items()}
    rate = {name: float(np.median(one.images_per_second)) for name, one in samples.items()}
    found = {"hop_ms": alone["triton stream"] - alone["engine"]}
    for name in ("bytes", "base64"):
        found[f"gateway_{name}_ms"] = alone[f"http, {name}"] - alone["triton stream"]
        found[f"share_of_engine_{name}"] = rate[f"http, {name}"] / rate["engine"]
    return {name: round(value, 4) for name, value in found.items()}


def summary(milliseconds: list[float]) -> dict[str, float]:
    return {f"p{percent}": round(float(np.percentile(milliseconds, percent)), 3) for percent in (50, 99)}

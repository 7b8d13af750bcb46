"""What a video that runs beside them costs images: one image after another through the real Triton, with and without videos.

Calm and busy take turns, so that a machine that slows down for a while slows both. While it is busy there is always one video
under way. An image may wait for at most one piece of a video, an NFE or a chunk of its decoding, so the p95 of images may rise
by the longest of those and no more.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from server.engine.errors import EngineError, StudentError
from server.engine.fingerprint import device_class
from server.engine.student import open_student
from server.gateway.backend import BackendFailed, GenerationRequest, StudentCard
from server.gateway.triton_backend import TritonBackend

PROMPT = "a red circle"


@dataclass
class Videos:
    """What became of the videos: milliseconds of each NFE, and of a chunk in each decode."""

    card: StudentCard
    chunks: int
    nfe_ms: list[float] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)
    seeds: Iterator[int] = field(default_factory=lambda: iter(range(1 << 32)))

    async def run(self, backend: TritonBackend, begun: asyncio.Event) -> None:
        """One video after another until cancelled; `begun` is set when the first has had an NFE."""
        while True:
            request = GenerationRequest(self.card.name, PROMPT, next(self.seeds), 0, max(self.card.nfe), self.card.default_size)
            made = await backend.generate(request, on_step=lambda step: begun.set())
            for span in made.spans:
                if span.stage.startswith("nfe"):
                    self.nfe_ms.append(span.nanoseconds / 1e6)
                elif span.stage == "vae_decoder":
                    self.chunk_ms.append(span.nanoseconds / 1e6 / self.chunks)

    @contextlib.asynccontextmanager
    async def beside(self, backend: TritonBackend) -> AsyncIterator[None]:
        """Videos run while the block does."""
        begun = asyncio.Event()
        running, beginning = asyncio.create_task(self.run(backend, begun)), asyncio.create_task(begun.wait())
        try:
            await asyncio.wait((running, beginning), return_when=asyncio.FIRST_COMPLETED)
            yield
        finally:
            beginning.cancel()
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running  # raises what has ended it before its time


def run(repository: Path, student: str | None, video: str | None, rounds: int, images: int) -> None:
    """Measures, prints what came out, and one line of JSON last. Raises EngineError."""
    report(asyncio.run(measured(repository, student, video, rounds, images)))


async def measured(repository: Path, student: str | None, video: str | None, rounds: int, images: int) -> dict[str, Any]:
    """The document of a run. Raises EngineError."""
    backend = TritonBackend(repository)
    try:
        await backend.start()
        card = chosen(backend, "image", student)
        moving = chosen(backend, "video", video)
        chunks = open_student(repository / moving.name).manifest.chunks
        assert chunks
        return await measure(backend, card, Videos(moving, len(chunks)), rounds, images)
    except BackendFailed as error:
        raise StudentError(str(error)) from None
    finally:
        await backend.stop()


def chosen(backend: TritonBackend, media_type: str, name: str | None) -> StudentCard:
    """The named student of this media type, or the first. Raises StudentError."""
    cards = [card for card in backend.students.values() if card.media_type == media_type]
    found = next((card for card in cards if name in (None, card.name)), None)
    if found is None:
        served = ", ".join(card.name for card in cards) or "none"
        raise StudentError(f"no student of {media_type}s{f' is named {name!r}' if name else ''} here; there is: {served}")
    return found


async def measure(backend: TritonBackend, card: StudentCard, videos: Videos, rounds: int, images: int) -> dict[str, Any]:
    """Milliseconds of images in turns, calm and busy."""
    seeds = iter(range(1 << 32))
    calm: list[float] = []
    busy: list[float] = []
    for _ in tqdm(range(rounds), desc="rounds", dynamic_ncols=True):
        calm += [await one_image(backend, card, next(seeds)) for _ in range(images)]
        async with videos.beside(backend):
            busy += [await one_image(backend, card, next(seeds)) for _ in range(images)]
    if not videos.chunk_ms:
        raise EngineError("no video was made meanwhile; measure for longer with --rounds or --images")
    longest = max(*videos.nfe_ms, *videos.chunk_ms)
    document: dict[str, Any] = {
        "benchmark": "interference",
        "student": card.name,
        "fingerprint": card.fingerprint,
        "device": device_class(),
    }
    document |= {"video": videos.card.name, "video_fingerprint": videos.card.fingerprint, "rounds": rounds, "images": images}
    document |= {"calm": quantiles(calm), "busy": quantiles(busy)}
    document |= {"video_nfe_ms": quantiles(videos.nfe_ms), "video_chunk_ms": quantiles(videos.chunk_ms)}
    document |= {"videos": len(videos.chunk_ms), "longest_piece_ms": round(longest, 2)}
    rise = {name: round(document["busy"][name] - document["calm"][name], 2) for name in ("p50", "p95")}
    return document | {"rise_ms": rise, "samples_ms": {"calm": rounded(calm), "busy": rounded(busy)}}


async def one_image(backend: TritonBackend, card: StudentCard, seed: int) -> float:
    """Milliseconds of an image over Triton's stream."""
    begin = time.perf_counter()
    await backend.generate(GenerationRequest(card.name, PROMPT, seed, 0, max(card.nfe), card.default_size))
    return 1000 * (time.perf_counter() - begin)


def quantiles(values: list[float]) -> dict[str, float]:
    return {name: round(float(np.percentile(values, percent)), 2) for name, percent in (("p50", 50), ("p95", 95), ("max", 100))}


def rounded(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]


def report(document: dict[str, Any]) -> None:
    """For people; the JSON line that follows is for machines."""
    print(f"{'ms':<24}{'p50':>10}{'p95':>10}{'max':>10}")
    named = {"images alone": "calm", "images beside videos": "busy", "NFE of a video": "video_nfe_ms"}
    for name, key in (named | {"chunk of a video": "video_chunk_ms"}).items():
        print(f"{name:<24}" + "".join(f"{document[key][one]:>10}" for one in ("p50", "p95", "max")))
    rise, longest = document["rise_ms"]["p95"], document["longest_piece_ms"]
    print(f"the p95 of images rises by {rise} ms; the longest piece of a video took {longest} ms (goal: at most that)")
    print(json.dumps(document))

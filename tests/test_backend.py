"""The seam to the students: images and videos through it in process and by the real Triton, with the same pixels."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engine.engine import Engine, Request
from server.gateway.backend import Backend, Generated, GenerationRequest
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.triton_backend import TritonBackend

SIZE, SHAPE = "48x32", (17, 32, 48, 3)
BACKENDS = [
    InProcessBackend,
    pytest.param(TritonBackend, marks=pytest.mark.skipif(sys.platform != "linux", reason="the Triton wheel is for Linux")),
]
VIDEO = GenerationRequest("cogvideox-2b", "a red circle", 7, 0, 4, SIZE)
IMAGE = GenerationRequest("scenes", "a red circle", 7, 0, 4, "128x128")


def served(kind: Callable[[Path], Any], repository: Path, ask: Callable[[Backend], Awaitable[Any]]) -> Any:
    """What `ask` gives of a backend that runs meanwhile."""

    async def run() -> Any:
        backend = kind(repository)
        try:
            await backend.start()
            return await ask(backend)
        finally:
            await backend.stop()

    return asyncio.run(run())


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_video_has_the_engine_s_own_pixels_with_and_without_listeners(kind: Any, video_repository: Path) -> None:
    async def ask(backend: Backend) -> tuple[Generated, Generated, list[Any]]:
        heard: list[Any] = []
        watched = replace(VIDEO, previews=(1, 3))
        made = await backend.generate(watched, lambda step, image: heard.append((step, image)), heard.append)
        return made, await backend.generate(VIDEO), heard

    watched, plain, heard = served(kind, video_repository, ask)
    alone = Engine.open(video_repository / VIDEO.student).run(Request(VIDEO.prompt, VIDEO.seed, 0, VIDEO.nfe, SIZE))
    assert watched.image.shape == SHAPE
    assert np.array_equal(watched.image, alone.image)
    assert np.array_equal(plain.image, alone.image)
    assert watched.fingerprint == plain.fingerprint == alone.fingerprint
    assert [step for step in heard if isinstance(step, int)] == [1, 2, 3, 4]
    previews = [one for one in heard if not isinstance(one, int)]
    assert [step for step, _ in previews] == [1, 3]
    assert heard.index(1) < next(index for index, one in enumerate(heard) if one is previews[0])
    assert "preview" not in {span.stage for span in plain.spans}, "nothing is decoded that nobody asked for"
    first, last = (np.abs(image.astype(int) - plain.image[: len(image)]).mean() for _, image in previews)
    assert first > last > 0, "previews are real and draw near"


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_card_says_what_a_student_makes(kind: Any, video_repository: Path) -> None:
    async def ask(backend: Backend) -> Any:
        return backend.students

    students = served(kind, video_repository, ask)
    assert [(card.media_type, card.frames, card.fps) for card in students.values()] == [("video", 17, 8), ("image", None, None)]
    assert all(card.fingerprint.startswith("fp_") for card in students.values())


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_steps_of_an_image_are_told_as_those_of_a_video(kind: Any, video_repository: Path) -> None:
    async def ask(backend: Backend) -> list[int]:
        heard: list[int] = []
        await backend.generate(IMAGE, on_step=heard.append)
        return heard

    assert served(kind, video_repository, ask) == [1, 2, 3, 4]

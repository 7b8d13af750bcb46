"""The seam to the students: images and videos through it in process and by the real Triton, with the same pixels."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engine.engine import Engine
from server.engine.request import Request
from server.gateway.backend import Backend, Generated, GenerationRequest
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.triton_backend import TritonBackend
from tests.tiny_video import build_tiny_video

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
def test_cards_say_what_students_make_those_of_images_first(kind: Any, video_repository: Path) -> None:
    async def ask(backend: Backend) -> Any:
        return backend.students

    students = served(kind, video_repository, ask)
    assert [(card.media_type, card.frames, card.fps) for card in students.values()] == [("image", None, None), ("video", 17, 8)]
    assert all(card.fingerprint.startswith("fp_") for card in students.values())


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_steps_of_an_image_are_told_as_those_of_a_video(kind: Any, video_repository: Path) -> None:
    async def ask(backend: Backend) -> list[int]:
        heard: list[int] = []
        await backend.generate(IMAGE, on_step=heard.append)
        return heard

    assert served(kind, video_repository, ask) == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_video_of_full_size_passes_with_all_its_frames(kind: Any, tmp_path: Path) -> None:
    """49 frames of 720x480, as CogVideoX-2B makes them: 51 MB in one message."""
    build_tiny_video(tmp_path, "720x480", (3, 2, 2, 2, 2, 2))
    request = GenerationRequest("tiny-video", "a", 7, 0, 2, "720x480", previews=(1,))

    async def ask(backend: Backend) -> tuple[Generated, list[Any]]:
        heard: list[Any] = []
        return await backend.generate(request, lambda step, image: heard.append(image.shape)), heard

    made, heard = served(kind, tmp_path, ask)
    assert made.image.nbytes == 49 * 480 * 720 * 3
    assert heard == [(9, 480, 720, 3)]
    alone = Engine.open(tmp_path / "tiny-video").run(Request("a", 7, 0, 2, "720x480"))
    assert np.array_equal(made.image, alone.image)


@pytest.mark.parametrize("kind", BACKENDS)
def test_videos_and_images_at_once_are_those_made_alone_whoever_is_cancelled(kind: Any, video_repository: Path) -> None:
    asked = [replace(VIDEO, seed=seed, nfe=1 + seed % 4) for seed in range(8)] + [
        replace(IMAGE, seed=seed) for seed in range(8)
    ]

    async def ask(backend: Backend) -> list[Any]:
        tasks = [asyncio.create_task(backend.generate(request)) for request in asked]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[1::3]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = served(kind, video_repository, ask)
    engines = {name: Engine.open(video_repository / name) for name in (VIDEO.student, IMAGE.student)}
    made = [(request, outcome) for request, outcome in zip(asked, outcomes, strict=True) if isinstance(outcome, Generated)]
    assert len(made) >= len(asked) - len(asked[1::3])
    for request, outcome in made:
        alone = engines[request.student].run(Request(request.prompt, request.seed, 0, request.nfe, request.size))
        assert np.array_equal(outcome.image, alone.image)

"""A server of videos with the real application, store and files; its student is a fake, which a test may tell when to work."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from server.gateway.app import create_app
from server.gateway.settings import Settings
from server.gateway.video_responses import Video
from tests.fakes import FakeVideos

PATH = "/v1/videos"
BODY = {"prompt": "a red circle moves left", "seed": 7}
SHAPE = (16, 48, 64, 3)


@dataclass
class Service:
    """A server of videos, and a client of it."""

    app: FastAPI
    client: httpx.AsyncClient
    backend: FakeVideos

    async def create(self, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        answer = await self.client.post(PATH, json=BODY | fields, headers=headers)
        assert answer.status_code == 200, answer.text
        return Video.model_validate_json(answer.content).model_dump()

    async def get(self, video_id: str) -> dict[str, Any]:
        answer = await self.client.get(f"{PATH}/{video_id}")
        assert answer.status_code == 200, answer.text
        return Video.model_validate_json(answer.content).model_dump()

    async def ended(self, video_id: str) -> dict[str, Any]:
        return await until(lambda: self.get(video_id), lambda video: video["status"] in ("completed", "failed"))

    async def dropped(self, video_id: str) -> None:
        """No worker is at it any more."""

        async def look() -> bool:
            return video_id in self.app.state.videos.maker.running

        await until(look, lambda running: not running)

    async def made(self, **fields: Any) -> dict[str, Any]:
        video = await self.ended((await self.create(**fields))["id"])
        assert video["status"] == "completed", video
        return video


async def until(look: Callable[[], Awaitable[Any]], done: Callable[[Any], bool], seconds: float = 30) -> Any:
    """What `look` finds once it is `done`."""
    async with asyncio.timeout(seconds):
        while not done(found := await look()):
            await asyncio.sleep(0.02)
    return found


@asynccontextmanager
async def serving(folder: Path, patient: bool = False, **settings: Any) -> AsyncIterator[Service]:
    backend = FakeVideos(patient)
    app = create_app(backend, Settings(jobs_folder=folder / "jobs", **settings))
    await app.state.videos.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            yield Service(app, client, backend)
    finally:
        await app.state.videos.stop()


def served(folder: Path, use: Callable[[Service], Awaitable[Any]], patient: bool = False, **settings: Any) -> Any:
    """What `use` gives of a server that runs meanwhile."""

    async def run() -> Any:
        async with serving(folder, patient, **settings) as service:
            return await use(service)

    return asyncio.run(run())


def envelope(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)

"""What is heard of a job while it is made, and when listening ends."""

import asyncio
import json
from pathlib import Path
from typing import Any

from server.gateway.video_events import events
from tests.video_service import PATH, Service, served


def parse(event: bytes) -> dict[str, Any]:
    """The JSON of an event, whose name is its type."""
    name, data = event.decode().removesuffix("\n\n").split("\n")
    parsed: dict[str, Any] = json.loads(data.removeprefix("data: "))
    assert name == f"event: {parsed['type']}"
    return parsed


def test_events_tell_every_nfe_the_predictions_and_the_end(tmp_path: Path) -> None:
    async def use(service: Service) -> list[dict[str, Any]]:
        video = await service.create(partial_images=2)
        heard: list[dict[str, Any]] = []
        async for event in events(service.app.state.videos, service.app.state.drain, video["id"], "anonymous"):
            heard.append(parse(event))
            service.backend.let(1)
        return heard

    heard = served(tmp_path, use, patient=True)
    states = [event["video"] for event in heard if "video" in event]
    running = [state["progress"] for state in states if state["status"] == "in_progress"]
    assert running == sorted(set(running))
    assert {25, 50, 75, 99} <= set(running)
    assert (states[-1]["status"], states[-1]["progress"]) == ("completed", 100)
    partial = [event for event in heard if event["type"] == "video.partial_image"]
    assert [(event["step"], event["partial_image_index"], event["num_frames"]) for event in partial] == [(1, 0, 2), (3, 1, 2)]


def test_events_begin_with_the_present_state_also_of_what_has_ended(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        video = await service.made()
        for _ in range(2):
            answer = await service.client.get(f"{PATH}/{video['id']}/events")
            assert answer.headers["content-type"].startswith("text/event-stream")
            only = parse(answer.content)
            assert (only["type"], only["video"]) == ("video.completed", video)

    served(tmp_path, use)


def test_events_of_a_video_that_is_deleted_or_cancelled_end_with_that(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        for method, path, last in (("POST", "/cancel", "video.failed"), ("DELETE", "", "video.deleted")):
            video, heard = await service.create(), []
            async for event in events(service.app.state.videos, service.app.state.drain, video["id"], "anonymous"):
                heard.append(parse(event)["type"])
                await service.client.request(method, f"{PATH}/{video['id']}{path}")
            assert heard[-1] == last

    served(tmp_path, use, patient=True)


def test_events_end_with_the_server(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        video = await service.create()
        async with asyncio.timeout(30):
            async for _ in events(service.app.state.videos, service.app.state.drain, video["id"], "anonymous"):
                service.app.state.drain.draining = True

    served(tmp_path, use, patient=True)

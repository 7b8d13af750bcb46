"""/v1/videos over the real application, store and files; the students are a fake where a test decides when they work."""

import asyncio
import io
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from server.gateway.app import create_app
from server.gateway.backend import BackendUnavailable, InvalidRequest, NumericalError
from server.gateway.keys import create
from server.gateway.settings import Settings
from server.gateway.video_events import events
from server.gateway.video_media import read_mp4
from server.gateway.video_responses import DeletedVideo, Video, VideoPage
from server.metadata import pixel_sha256
from tests.conftest import start_server
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


def test_a_job_is_taken_in_made_and_downloaded(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        created = await service.create()
        assert created["status"] in ("queued", "in_progress")
        video = await service.ended(created["id"])
        assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
        assert (video["seconds"], video["size"], video["num_inference_steps"], video["seed"]) == ("2", "64x48", 4, 7)
        assert video["created_at"] <= video["completed_at"] < video["expires_at"]
        assert video["fingerprint"] == "fp_fake"
        assert video["inference_time_s"] > 0
        assert video["peak_memory_mb"] > 10, "a Python with numpy has more"
        assert len(video["timings"]["steps"]) == 4
        content = await service.client.get(f"{PATH}/{video['id']}/content")
        assert content.headers["content-type"] == "video/mp4"
        frames, fps = read_mp4(content.content)
        assert (frames.shape, fps) == (SHAPE, 8)
        assert content.headers["x-pixel-sha256"] == pixel_sha256(np.full(SHAPE, 7, np.uint8))
        assert (content.headers["x-seed"], content.headers["x-fingerprint"]) == ("7", "fp_fake")

    served(tmp_path, use)


def test_a_form_makes_the_same_job_as_json(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        fields = {"prompt": BODY["prompt"], "seed": "7", "seconds": "2", "num_frames": "16", "fps": "8", "size": "64x48"}
        answer = await service.client.post(PATH, files={name: (None, value) for name, value in fields.items()})
        assert answer.status_code == 200, answer.text
        by_form, by_json = await service.ended(answer.json()["id"]), await service.made()
        same = ("model", "prompt", "seed", "seconds", "size", "num_inference_steps", "fingerprint")
        assert [by_form[name] for name in same] == [by_json[name] for name in same]
        contents = [await service.client.get(f"{PATH}/{one['id']}/content") for one in (by_form, by_json)]
        assert contents[0].headers["etag"] == contents[1].headers["etag"]

    served(tmp_path, use)


def test_a_page_holds_the_videos_of_a_key_and_goes_on_after_its_last(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        ids = [(await service.create(seed=seed))["id"] for seed in range(5)]
        for order, expected in (("asc", ids), ("desc", ids[::-1])):
            found, after = [], {}
            for size in (2, 2, 1):
                answer = await service.client.get(PATH, params={"limit": 2, "order": order} | after)
                page = VideoPage.model_validate_json(answer.content)
                assert (len(page.data), page.has_more) == (size, size == 2)
                assert (page.first_id, page.last_id) == (page.data[0].id, page.data[-1].id)
                found += [video.id for video in page.data]
                after = {"after": page.last_id}
            assert found == expected
        answer = await service.client.get(PATH, params={"after": ids[0]})
        assert answer.json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order")):
            assert envelope(await service.client.get(f"{PATH}?{query}"), 400)["param"] == param
        for query, param in (("before=1", "before"), ("after=video_1", "after"), ("order=asc&order=asc", "order")):
            assert envelope(await service.client.get(f"{PATH}?{query}"), 400)["param"] == param
        unknown = await service.client.get(PATH, params={"after": f"video_{'0' * 32}"})
        assert envelope(unknown, 404)["code"] == "video_not_found"

    served(tmp_path, use)


def test_a_file_is_sent_whole_in_part_and_not_at_all(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        path = f"{PATH}/{(await service.made())['id']}/content"
        whole = await service.client.get(path)
        tag, size = whole.headers["etag"], len(whole.content)
        assert whole.headers["content-length"] == str(size)
        assert whole.headers["accept-ranges"] == "bytes"
        pieces = []
        for begin in range(0, size, 500):
            part = await service.client.get(path, headers={"range": f"bytes={begin}-{begin + 499}", "if-range": tag})
            assert part.status_code == 206
            assert part.headers["content-range"] == f"bytes {begin}-{min(begin + 500, size) - 1}/{size}"
            pieces.append(part.content)
        assert b"".join(pieces) == whole.content
        assert (await service.client.get(path, headers={"range": "bytes=-9"})).content == whole.content[-9:]
        assert (await service.client.get(path, headers={"range": "bytes=0-1", "if-range": '"old"'})).content == whole.content
        beyond = await service.client.get(path, headers={"range": f"bytes={size}-"})
        assert envelope(beyond, 416)["code"] == "range_not_satisfiable"
        assert beyond.headers["content-range"] == f"bytes */{size}"
        head = await service.client.head(path)
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(size))
        known = await service.client.get(path, headers={"if-none-match": tag})
        assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", tag)

    served(tmp_path, use)


def test_a_video_is_had_as_webp_and_gif_and_its_thumbnail(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        path = f"{PATH}/{(await service.made())['id']}/content"
        for query, kind in (("format=webp", "WEBP"), ("format=gif", "GIF"), ("variant=thumbnail", "WEBP")):
            answer = await service.client.get(f"{path}?{query}")
            assert answer.headers["content-type"] == f"image/{kind.lower()}"
            with Image.open(io.BytesIO(answer.content)) as picture:
                assert (picture.format, picture.size) == (kind, (64, 48))
            part = await service.client.get(f"{path}?{query}", headers={"range": "bytes=5-9"})
            assert part.content == answer.content[5:10]
            assert part.headers["etag"] == answer.headers["etag"]
        for query, param in (
            ("variant=spritesheet", "variant"),
            ("format=webm", "format"),
            ("variant=thumbnail&format=gif", None),
        ):
            assert envelope(await service.client.get(f"{path}?{query}"), 400)["param"] == param

    served(tmp_path, use)


def test_a_file_is_404_before_it_is_there_and_410_after(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        video = await service.create()
        path = f"{PATH}/{video['id']}/content"
        early = await service.client.get(path)
        assert envelope(early, 404)["code"] == "video_not_ready"
        assert early.headers["x-should-retry"] == "false"
        service.backend.let(4)
        await service.ended(video["id"])
        late = await until(lambda: service.client.get(path), lambda answer: answer.status_code != 200)
        assert envelope(late, 410)["code"] == "expired"
        assert (await service.get(video["id"]))["status"] == "completed"

    served(tmp_path, use, patient=True, video_ttl_seconds=1)


def test_a_cancelled_video_stops_within_one_nfe_and_has_failed(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        video = await service.create()
        service.backend.let(1)
        await until(lambda: service.get(video["id"]), lambda found: found["progress"] == 25)
        answer = await service.client.post(f"{PATH}/{video['id']}/cancel")
        assert answer.json()["error"]["code"] == "cancelled"
        await service.dropped(video["id"])
        following = await service.create(prompt="another")
        service.backend.let(10)
        assert (await service.ended(following["id"]))["status"] == "completed"
        assert [step for prompt, step in service.backend.executed if prompt == BODY["prompt"]] == [1]
        found = await service.get(video["id"])
        assert (found["status"], found["completed_at"]) == ("failed", None)
        assert envelope(await service.client.get(f"{PATH}/{video['id']}/content"), 404)["code"] == "video_failed"
        again = await service.client.post(f"{PATH}/{following['id']}/cancel")
        assert again.json()["status"] == "completed", "cancelling what has ended changes nothing"

    served(tmp_path, use, patient=True)


def test_a_deleted_video_stops_and_is_gone(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        video = await service.create()
        service.backend.let(1)
        await until(lambda: service.get(video["id"]), lambda found: found["progress"] == 25)
        answer = await service.client.delete(f"{PATH}/{video['id']}")
        assert DeletedVideo.model_validate_json(answer.content).id == video["id"]
        await service.dropped(video["id"])
        following = await service.create(prompt="another")
        service.backend.let(10)
        await service.ended(following["id"])
        assert [step for prompt, step in service.backend.executed if prompt == BODY["prompt"]] == [1]
        for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
            gone = await service.client.request(method, f"{PATH}/{video['id']}{path}")
            assert envelope(gone, 404)["code"] == "video_not_found"

    served(tmp_path, use, patient=True)


def test_one_idempotency_key_is_one_video_however_it_is_sent(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        key = {"idempotency-key": "mine"}
        form = {name: (None, str(value)) for name, value in BODY.items()}
        asked = [service.client.post(PATH, json=BODY, headers=key) for _ in range(20)]
        asked += [service.client.post(PATH, files=form, headers=key) for _ in range(5)]
        answers = await asyncio.gather(*asked)
        assert len({answer.json()["id"] for answer in answers}) == 1
        other = await service.client.post(PATH, json=BODY | {"seed": 8}, headers=key)
        assert envelope(other, 409)["code"] == "idempotency_conflict"
        assert other.headers["x-should-retry"] == "false"
        for bad in ("", "x" * 256, "\u00e4"):
            refused = await service.client.post(PATH, json=BODY, headers={"idempotency-key": bad.encode("latin-1")})
            assert envelope(refused, 400)["param"] == "idempotency-key"
        assert len((await service.client.get(PATH)).json()["data"]) == 1

    served(tmp_path, use)


def test_a_full_queue_refuses_exactly_what_is_too_much_but_never_a_repeat(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        # The first 4 NFEs and the rest of a video are taken for 5 * 0.02 s before anything is known.
        first = await service.create({"idempotency-key": "first"})
        await service.create()
        full = await service.client.post(PATH, json=BODY)
        assert envelope(full, 503)["code"] == "overloaded"
        assert int(full.headers["retry-after"]) >= 1
        assert (await service.create({"idempotency-key": "first"}))["id"] == first["id"]
        await service.client.delete(f"{PATH}/{first['id']}")
        await service.create()

    served(tmp_path, use, patient=True, max_video_queue_seconds=0.2)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (NumericalError("inf"), "numerical_error"),
        (InvalidRequest("bad", "prompt"), "invalid_value"),
        (RuntimeError("/a/b.py"), "internal_error"),
    ],
)
def test_what_fails_says_why_and_nothing_of_the_inside(tmp_path: Path, failure: Exception, code: str) -> None:
    async def use(service: Service) -> None:
        service.backend.failure = failure
        error = (await service.ended((await service.create())["id"]))["error"]
        assert error["code"] == code
        assert "/a/b.py" not in error["message"]
        metrics = (await service.client.get("/metrics")).text
        assert f'fewstep_video_jobs_failed{{reason="{code}"}} 1.0' in metrics
        assert 'fewstep_video_jobs{status="failed"} 1.0' in metrics

    served(tmp_path, use)


def test_a_backend_that_dies_gives_the_job_back_to_the_queue(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        video = await service.create()
        service.backend.failure = BackendUnavailable("down for now")
        service.backend.let(1)
        await until(lambda: service.get(video["id"]), lambda found: found["status"] == "queued")

    served(tmp_path, use, patient=True)


def test_jobs_outlive_the_server_and_are_made_by_the_next(tmp_path: Path) -> None:
    async def take(service: Service) -> str:
        video = await service.create()
        service.backend.let(2)
        await until(lambda: service.get(video["id"]), lambda found: found["progress"] == 50)
        return str(video["id"])

    video_id = served(tmp_path, take, patient=True)
    video = served(tmp_path, lambda service: service.ended(video_id))
    assert (video["status"], video["seed"]) == ("completed", 7)


def test_another_key_s_video_is_no_video(tmp_path: Path) -> None:
    keys = [create(tmp_path / "keys.json", name, ["videos"], None, None, None) for name in ("mine", "yours")]
    mine, yours = ({"authorization": f"Bearer {key}"} for key in keys)

    async def use(service: Service) -> None:
        video = (await service.client.post(PATH, json=BODY, headers=mine)).json()
        for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
            answer = await service.client.request(method, f"{PATH}/{video['id']}{path}", headers=yours)
            assert envelope(answer, 404)["code"] == "video_not_found"
        assert (await service.client.get(PATH, headers=yours)).json()["data"] == []
        assert (await service.client.get(PATH, params={"after": video["id"]}, headers=yours)).status_code == 404
        assert (await service.client.get(f"{PATH}/{video['id']}", headers=mine)).status_code == 200

    served(tmp_path, use, keys_file=tmp_path / "keys.json")


def test_a_server_without_a_student_of_videos_says_so(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        asked = [("POST", ""), ("GET", ""), ("POST", "/sync"), ("GET", f"/video_{'0' * 32}"), ("DELETE", f"/video_{'0' * 32}")]
        service.app.state.backend.students = {"scenes": service.backend.students["motion"].__class__(**IMAGE)}
        for method, path in asked:
            answer = await service.client.request(method, PATH + path, json=BODY if method == "POST" else None)
            error = envelope(answer, 404)
            assert error["code"] == "model_not_found"
            assert "no student that makes videos is served here, only scenes" in error["message"]

    served(tmp_path, use)


IMAGE: dict[str, Any] = {
    "name": "scenes",
    "media_type": "image",
    "family": "pixart",
    "revision": "0",
    "nfe": (4,),
    "default_nfe": 4,
}
IMAGE |= {"sizes": {"64x64": [4, 8, 8]}, "frames": None, "fps": None, "text_length": 12, "max_prompt_characters": 9}
IMAGE |= {"manifest_sha256": ""}


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
    assert {25, 50, 75} < set(running)
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


def test_sync_answers_with_the_video_itself(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        answer = await service.client.post(f"{PATH}/sync", json=BODY)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
        with av.open(io.BytesIO(answer.content)) as container:
            assert container.streams.video[0].frames == 16
        job = await service.made()
        content = await service.client.get(f"{PATH}/{job['id']}/content")
        assert content.content == answer.content
        for name in ("x-pixel-sha256", "x-seed", "x-fingerprint"):
            assert content.headers[name] == answer.headers[name]
        assert "nfe4;dur=" in answer.headers["server-timing"]
        gif = await service.client.post(f"{PATH}/sync", json=BODY, headers={"accept": "image/gif"})
        assert gif.content.startswith(b"GIF89a")
        refused = await service.client.post(f"{PATH}/sync", json=BODY | {"partial_images": 1})
        assert envelope(refused, 400)["param"] == "partial_images"
        assert len((await service.client.get(PATH)).json()["data"]) == 1, "it is no job"

    served(tmp_path, use)


def test_pixels_are_the_same_by_job_and_by_sync_through_the_real_student(tmp_path: Path, clips_backend: Any) -> None:
    async def run() -> None:
        app = create_app(clips_backend, Settings(jobs_folder=tmp_path / "jobs"))
        await app.state.videos.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
            service = Service(app, client, clips_backend)
            jobs = [await service.create(prompt="a red circle", partial_images=previews) for previews in (0, 2)]
            made = [await service.ended(job["id"]) for job in jobs]
            contents = [await client.get(f"{PATH}/{video['id']}/content") for video in made]
            sync = await client.post(f"{PATH}/sync", json=BODY | {"prompt": "a red circle"})
            assert len({one.headers["x-pixel-sha256"] for one in (*contents, sync)}) == 1
            assert len({one.content for one in (*contents, sync)}) == 1
            assert read_mp4(sync.content)[0].shape == (25, 32, 64, 3)
            assert made[0]["seconds"] == "3.125"
        await app.state.videos.stop()

    asyncio.run(run())


def test_without_its_database_the_server_says_so_and_recovers_by_itself(tmp_path: Path) -> None:
    in_the_way = tmp_path / "jobs"
    in_the_way.write_text("a file where the folder should be")

    async def use(service: Service) -> None:
        for method, path in (("POST", ""), ("GET", ""), ("GET", f"/video_{'0' * 32}"), ("DELETE", f"/video_{'0' * 32}")):
            answer = await service.client.request(method, PATH + path, json=BODY if method == "POST" else None)
            assert envelope(answer, 503)["code"] == "store_unavailable"
            assert str(tmp_path) not in answer.text
            assert int(answer.headers["retry-after"]) >= 1
        assert (await service.client.post(f"{PATH}/sync", json=BODY)).status_code == 200, "it needs no database"
        assert "fewstep_video_jobs" not in (await service.client.get("/metrics")).text
        in_the_way.unlink()

        async def ask() -> int:
            return (await service.client.post(PATH, json=BODY)).status_code

        await until(ask, lambda status: status == 200)
        await service.made()

    served(tmp_path, use)


def test_a_file_that_is_gone_from_the_storage_is_a_410(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        video = await service.made()
        shutil.rmtree(tmp_path / "jobs" / "files")
        for query in ("", "?format=gif", "?variant=thumbnail"):
            answer = await service.client.get(f"{PATH}/{video['id']}/content{query}")
            assert envelope(answer, 410)["code"] == "expired"

    served(tmp_path, use)


@pytest.mark.parametrize("url", ["sqlite:///{}/other.sqlite", "postgresql://nobody:secret-of-nobody@127.0.0.1:1/none"])
def test_another_database_is_used_and_one_that_is_far_away_is_told_without_its_password(tmp_path: Path, url: str) -> None:
    async def run() -> None:
        app = create_app(FakeVideos(), Settings(jobs_folder=tmp_path, jobs_url=url.format(tmp_path)))  # type: ignore[arg-type]
        await app.state.videos.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = await client.post(PATH, json=BODY)
        assert answer.status_code == (200 if url.startswith("sqlite") else 503)
        assert "secret-of-nobody" not in answer.text
        await app.state.videos.stop()

    asyncio.run(run())


def test_a_job_of_a_server_that_was_killed_is_made_by_the_next_with_the_same_pixels(
    clips_repository: Path, tmp_path: Path
) -> None:
    folder, asked = {"FEWSTEP_JOBS_FOLDER": str(tmp_path)}, {"prompt": "a red circle", "seed": 7}
    first = start_server(clips_repository, "inprocess", "--set", "video_workers=0", **folder)
    video = httpx.post(first.url + PATH, json=asked).json()
    first.process.kill()
    first.process.wait()
    second = start_server(clips_repository, "inprocess", **folder)
    with httpx.Client(base_url=second.url, timeout=60) as client:
        assert client.get(f"{PATH}/{video['id']}/events").text.rpartition("event: ")[2].startswith("video.completed")
        content, sync = client.get(f"{PATH}/{video['id']}/content"), client.post(f"{PATH}/sync", json=asked)
        assert content.headers["x-pixel-sha256"] == sync.headers["x-pixel-sha256"]
        assert content.content == sync.content
    assert second.stop() == 0

"""/v1/videos over the real application, store and files; the student is a fake where a test decides when it works."""

import asyncio
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import uvicorn

from server.gateway.admission import Cost
from server.gateway.app import create_app
from server.gateway.keys import create
from server.gateway.serve import listen
from server.gateway.settings import Settings
from server.gateway.video_media import read_mp4
from server.gateway.video_responses import DeletedVideo, VideoPage
from server.metadata import pixel_sha256
from tests.conftest import Server
from tests.fakes import MOTION, FakeVideos
from tests.video_service import BODY, PATH, SHAPE, Service, envelope, served, until


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


def test_either_database_keeps_whatever_a_prompt_may_hold(jobs_url: str, tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        prompts = ["a\x00b", "\u05d0\u202e", "\U0001f534 \\u0000", "'; DROP TABLE jobs; --"]
        made = [await service.made(prompt=prompt, seed=2**64 - 1) for prompt in prompts]
        assert [video["prompt"] for video in made] == prompts
        assert {video["seed"] for video in made} == {2**64 - 1}
        key = {"idempotency-key": "'; --"}
        asked = [service.client.post(PATH, json=BODY, headers=key) for _ in range(10)]
        assert len({answer.json()["id"] for answer in await asyncio.gather(*asked)}) == 1
        page = (await service.client.get(PATH, params={"limit": 3, "order": "asc"})).json()
        assert [video["prompt"] for video in page["data"]] == prompts[:3]
        assert (await service.client.delete(f"{PATH}/{made[0]['id']}")).json()["deleted"]

    served(tmp_path, use, jobs_url=jobs_url)


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
        for path in (PATH, f"{PATH}/sync"):
            full = await service.client.post(path, json=BODY)
            assert envelope(full, 503)["code"] == "overloaded"
            assert int(full.headers["retry-after"]) >= 1
        assert (await service.create({"idempotency-key": "first"}))["id"] == first["id"]
        await service.client.delete(f"{PATH}/{first['id']}")
        await service.create()

    served(tmp_path, use, patient=True, max_video_queue_seconds=0.2)


def test_when_to_look_again_is_a_quarter_of_what_is_predicted(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        service.app.state.videos.admission.costs["motion", "64x48"] = Cost(nfe=0.5, image=1.0)
        told = []
        for _ in range(10):
            answer = await service.client.post(PATH, json=BODY)
            told.append(int(answer.headers["openai-poll-after-ms"]))
        assert told[:3] == [750, 1250, 1750], "4 NFEs and the rest; then those of the videos before as well"
        assert told[-1] == 5000, "no client sleeps for longer"

    served(tmp_path, use, patient=True)


def test_a_key_may_hold_its_share_of_the_queue_and_others_theirs(tmp_path: Path) -> None:
    keys = [create(tmp_path / "keys.json", name, ["videos"], None, None, None) for name in ("mine", "yours")]
    mine, yours = ({"authorization": f"Bearer {key}"} for key in keys)

    async def use(service: Service) -> None:
        for _ in range(2):
            assert (await service.client.post(PATH, json=BODY, headers=mine)).status_code == 200
        refused = await service.client.post(PATH, json=BODY, headers=mine)
        assert envelope(refused, 429)["code"] == "queue_share"
        assert int(refused.headers["retry-after"]) >= 1
        assert (await service.client.post(PATH, json=BODY, headers=yours)).status_code == 200

    limits = {"max_video_queue_seconds": 0.4, "key_share": 0.5}  # 5 * 0.02 s are predicted for each
    served(tmp_path, use, patient=True, keys_file=tmp_path / "keys.json", **limits)


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
        image = dataclasses.replace(MOTION, name="scenes", media_type="image", frames=None, fps=None)
        service.backend.students = {"scenes": image}
        for method, path in asked:
            answer = await service.client.request(method, PATH + path, json=BODY if method == "POST" else None)
            error = envelope(answer, 404)
            assert error["code"] == "model_not_found"
            assert "no student that makes videos is served here, only scenes" in error["message"]

    served(tmp_path, use)


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


def test_a_prompt_of_too_many_tokens_becomes_no_job(tmp_path: Path, clips_backend: Any, clips_server: Server) -> None:
    """Neither in process nor through Triton."""
    body = BODY | {"prompt": "a " * 45}

    async def run() -> httpx.Response:
        app = create_app(clips_backend, Settings(jobs_folder=tmp_path / "jobs"))
        await app.state.videos.start()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = await client.post(PATH, json=body)
            assert (await client.get(PATH)).json()["data"] == []
        await app.state.videos.stop()
        return answer

    for answer in (asyncio.run(run()), httpx.post(clips_server.url + PATH, json=body)):
        error = envelope(answer, 400)
        assert error["param"] == "prompt"
        assert "tokens, at most" in error["message"]


def test_a_closed_socket_stops_a_synchronous_video(tmp_path: Path) -> None:
    async def run() -> list[tuple[str, int]]:
        backend = FakeVideos(patient=True)
        app = create_app(backend, Settings(jobs_folder=tmp_path))
        with listen("127.0.0.1", 0) as listener:
            server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
            serving = asyncio.create_task(server.serve([listener]))
            _, writer = await asyncio.open_connection(*listener.getsockname())
            body = json.dumps(BODY).encode()
            head = (
                f"POST {PATH}/sync HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            backend.let(1)
            await until(lambda: asyncio.sleep(0, len(backend.executed)), lambda count: count == 1)
            writer.close()
            await until(lambda: asyncio.sleep(0, app.state.videos.admission.total), lambda waiting: waiting == 0)
            backend.let(10)
            server.should_exit = True
            await serving
        return backend.executed

    assert asyncio.run(run()) == [(BODY["prompt"], 1)]

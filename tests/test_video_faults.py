"""What fails around videos: the student, the database, the storage, the server itself. No job is lost over it."""

import asyncio
import signal
import socket
import sqlite3
from pathlib import Path

import httpx
import pytest

from server.engine.device import DeviceLock, Priority
from server.gateway.app import create_app
from server.gateway.backend import BackendUnavailable, InvalidRequest, NumericalError
from server.gateway.settings import Settings
from server.jobs.store import JobStore
from tests.conftest import start_server
from tests.fakes import FakeVideos
from tests.test_drain import wait_until
from tests.video_service import BODY, PATH, Service, envelope, served, until


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


def test_a_database_of_another_version_ends_the_start_in_one_line(tmp_path: Path) -> None:
    served(tmp_path, lambda service: service.made())
    database = sqlite3.connect(tmp_path / "jobs" / "jobs.sqlite")
    database.execute("UPDATE schema_version SET version = 0")
    database.commit()
    database.close()
    with pytest.raises(ValueError, match="version 0") as caught:
        served(tmp_path, lambda service: service.made())
    assert len(str(caught.value).splitlines()) == 1


def half_a_request(url: str) -> socket.socket:
    """A connection on which a request has begun, so that the server has something to wait for."""
    connection = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 80), timeout=30)
    head = (f"POST {PATH}/sync HTTP/1.1", "Host: test", "Content-Type: application/json", "Content-Length: 9")
    connection.sendall("\r\n".join((*head, "Expect: 100-continue", "", "")).encode())
    assert connection.recv(100).startswith(b"HTTP/1.1 100"), "it waits for the body"
    return connection


def test_jobs_are_back_in_the_queue_before_a_second_signal_can_end_the_server(clips_repository: Path, tmp_path: Path) -> None:
    locks, jobs = tmp_path / "locks", JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    changes = {"FEWSTEP_JOBS_FOLDER": str(tmp_path), "FEWSTEP_LOCKS": str(locks)}
    server = start_server(clips_repository, "inprocess", **changes)
    lock = DeviceLock("cpu", Priority.HIGH, locks)
    with lock.held(), half_a_request(server.url):
        job_id = httpx.post(server.url + PATH, json=BODY).json()["id"]
        wait_until(lambda: jobs.get(job_id, "anonymous").status == "in_progress", 30)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: jobs.get(job_id, "anonymous").status == "queued", 30)
        assert server.process.poll() is None, "half a request is still waited for"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 128 + signal.SIGTERM
    lock.close()
    job = jobs.get(job_id, "anonymous")
    assert (job.status, job.attempts) == ("queued", 0)
    jobs.close()


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

"""An unmodified openai client makes videos on the real server, through the real Triton."""

import asyncio
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from server.gateway.video_media import read_mp4
from tests.conftest import Server

# OpenAI has said when its own videos end, and its client warns of that on every call.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

ASKED: dict[str, Any] = {"model": "tiny-video", "prompt": "a red circle", "extra_body": {"seed": 7}}


@pytest.fixture
def client(clips_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{clips_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_it_creates_a_video_waits_for_it_and_downloads_both_variants(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(**ASKED)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.seconds, video.size, video.object) == ("3.125", "64x32", "video")
    content = client.videos.download_content(video.id)
    frames, fps = read_mp4(content.read())
    assert (frames.shape, fps) == ((25, 32, 64, 3), 8)
    thumbnail = client.videos.download_content(video.id, variant="thumbnail").read()
    with Image.open(io.BytesIO(thumbnail)) as picture:
        assert (picture.format, picture.size) == ("WEBP", (64, 32))


def test_it_is_told_when_to_look_again(client: openai.OpenAI) -> None:
    created = client.videos.with_raw_response.create(**ASKED)
    assert 100 <= int(created.headers["openai-poll-after-ms"]) <= 5000
    video = client.videos.poll(created.parse().id)
    ended = client.videos.with_raw_response.retrieve(video.id)
    assert "openai-poll-after-ms" not in ended.headers


def test_it_lists_videos_page_by_page_and_deletes_them(client: openai.OpenAI) -> None:
    created = [client.videos.create(**ASKED).id for _ in range(3)]
    assert [video.id for video in client.videos.list(limit=2)][:3] == created[::-1], "it asks for page after page by itself"
    for video_id in created:
        gone = client.videos.delete(video_id)
        assert (gone.id, gone.deleted, gone.object) == (video_id, True, "video.deleted")
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video_id)
    assert not {video.id for video in client.videos.list()} & set(created)


def test_it_raises_its_own_errors_with_what_is_legal(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"seconds must be 3\.125") as caught:
        client.videos.create(**ASKED, seconds="4")
    assert caught.value.param == "seconds"
    with pytest.raises(openai.BadRequestError, match="size must be one of 64x32"):
        client.videos.create(**ASKED, size="720x1280")
    with pytest.raises(openai.BadRequestError, match="input_reference"):
        client.videos.create(**ASKED, input_reference=("a.png", b"PNG"))
    with pytest.raises(openai.NotFoundError) as missing:
        client.videos.create(model="sora-2", prompt="a")
    assert missing.value.code == "model_not_found"


def test_an_idempotency_key_makes_one_video_of_many_requests(clips_server: Server) -> None:
    async def ask() -> set[str]:
        async with openai.AsyncOpenAI(base_url=f"{clips_server.url}/v1", api_key="none", max_retries=0) as client:
            key = {"Idempotency-Key": "once"}
            videos = await asyncio.gather(*(client.videos.create(**ASKED, extra_headers=key) for _ in range(10)))
            with pytest.raises(openai.ConflictError):
                await client.videos.create(model="tiny-video", prompt="another", extra_headers=key)
            return {video.id for video in videos}

    assert len(asyncio.run(ask())) == 1

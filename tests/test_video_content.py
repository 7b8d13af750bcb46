"""The files of a finished video over HTTP: whole, in part, in other formats, and no longer there."""

import io
import shutil
from pathlib import Path

from PIL import Image

from tests.video_service import PATH, Service, envelope, served, until


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


def test_a_file_that_is_gone_from_the_storage_is_a_410(tmp_path: Path) -> None:
    async def use(service: Service) -> None:
        video = await service.made()
        shutil.rmtree(tmp_path / "jobs" / "files")
        for query in ("", "?format=gif", "?variant=thumbnail"):
            answer = await service.client.get(f"{PATH}/{video['id']}/content{query}")
            assert envelope(answer, 410)["code"] == "expired"

    served(tmp_path, use)


def test_a_storage_that_is_away_is_a_503_until_it_is_back(tmp_path: Path) -> None:
    files, away = tmp_path / "jobs" / "files", tmp_path / "away"

    async def use(service: Service) -> None:
        path = f"{PATH}/{(await service.made())['id']}/content"
        whole = await service.client.get(path)
        files.rename(away)
        files.write_text("a file where the folder should be")
        for query in ("", "?format=gif", "?variant=thumbnail"):
            answer = await service.client.get(path + query)
            assert envelope(answer, 503)["code"] == "storage_unavailable"
            assert int(answer.headers["retry-after"]) >= 1
            assert str(tmp_path) not in answer.text
        files.unlink()
        away.rename(files)
        assert (await service.client.get(path)).content == whole.content

    served(tmp_path, use)

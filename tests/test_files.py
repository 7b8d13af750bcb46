"""Links to images: good until they expire, without a key, and for nobody who changed them."""

import base64
import hashlib
import io
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError

from server.gateway import files
from server.gateway.app import create_app
from server.gateway.files import Files, open_files
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.serve import listen
from server.gateway.settings import Settings

PATH = "/v1/images/generations"
BODY = {"prompt": "a red circle", "seed": 7, "response_format": "url"}


@pytest.fixture(scope="module")
def app(tiny_backend: InProcessBackend) -> FastAPI:
    return create_app(tiny_backend, Settings())


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    app.state.files = Files()
    with TestClient(app) as client:
        yield client


def link(client: TestClient, headers: dict[str, str] | None = None, **changes: Any) -> str:
    answer = client.post(PATH, json=BODY | changes, headers=headers)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()["data"][0]) == {"url", "seed", "image_index", "cached"}
    url: str = answer.json()["data"][0]["url"]
    return url


def assert_refused(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert answer.headers["cache-control"] == "no-store"


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_link_leads_to_the_bytes_that_b64_json_holds(client: TestClient, format: str) -> None:
    answer = client.get(link(client, output_format=format))
    plain = client.post(PATH, json=BODY | {"response_format": "b64_json", "output_format": format}).json()
    assert answer.content == base64.b64decode(plain["data"][0]["b64_json"])
    assert answer.headers["content-type"] == f"image/{format}"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"].startswith("private, max-age=3")


def test_every_image_of_several_has_its_own_link(client: TestClient) -> None:
    several = client.post(PATH, json=BODY | {"n": 3}).json()["data"]
    assert len({client.get(image["url"]).content for image in several}) == 3


def test_head_says_what_get_would_and_sends_no_bytes(client: TestClient) -> None:
    url = link(client)
    head, get = client.head(url), client.get(url)
    assert head.status_code == 200
    assert head.content == b""
    for name in ("content-type", "content-length", "etag", "x-content-type-options"):
        assert head.headers[name] == get.headers[name]


def test_what_the_caller_has_already_is_not_sent_again(client: TestClient) -> None:
    url = link(client)
    tag = client.get(url).headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        answer = client.get(url, headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert client.get(url, headers={"if-none-match": '"other"'}).status_code == 200


def test_a_changed_link_is_a_403(client: TestClient) -> None:
    url, other = link(client), link(client, seed=8)
    parts, values = urlsplit(url), parse_qs(urlsplit(url).query)
    expires, signature = values["expires"][0], values["signature"][0]
    later = str(int(expires) + 1)
    changed = [
        parts.path,
        f"{parts.path}?expires={expires}",
        f"{parts.path}?signature={signature}",
        f"{parts.path}?expires={later}&signature={signature}",
        f"{parts.path}?expires=0{expires}&signature={signature}",
        f"{parts.path}?expires=never&signature={signature}",
        f"{parts.path}?expires={expires}&signature={signature.upper()}",
        f"{parts.path}?expires={expires}&signature={signature[:-1]}",
        f"{parts.path}?expires={expires}&signature=%ed%a0%80é",
        f"{urlsplit(other).path}?expires={expires}&signature={signature}",
        f"/files/none.png?expires={expires}&signature={signature}",
        f"/files/%0a?expires={expires}&signature={signature}",
    ]
    for one in changed:
        assert_refused(client.get(one), 403, "bad_signature")
    assert client.get(url).status_code == 200


def test_an_expired_link_is_a_410(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    url, now = link(client), time.time()
    monkeypatch.setattr(files.time, "time", lambda: now + files.TTL_SECONDS - 2)
    assert client.get(url).headers["cache-control"] in ("private, max-age=1, immutable", "private, max-age=2, immutable")
    monkeypatch.setattr(files.time, "time", lambda: now + files.TTL_SECONDS + 1)
    assert_refused(client.get(url), 410, "expired")


def test_a_link_that_was_only_just_made_expires_by_itself(client: TestClient, app: FastAPI) -> None:
    app.state.files = Files(ttl_seconds=1)
    url = link(client)
    assert client.get(url).status_code == 200
    time.sleep(1.1)
    assert_refused(client.get(url), 410, "expired")
    assert app.state.files.kept.currsize == 0


def test_memory_is_bounded_and_who_was_asked_for_longest_ago_goes(client: TestClient, app: FastAPI) -> None:
    one = len(client.get(link(client)).content)
    app.state.files = Files(budget=one * 5 // 2)
    first, second = link(client, seed=1), link(client, seed=2)
    assert client.get(first).status_code == 200
    third = link(client, seed=3)
    assert app.state.files.kept.currsize <= one * 5 // 2
    assert_refused(client.get(second), 410, "not_kept")
    assert [client.get(url).status_code for url in (first, third)] == [200, 200]


def test_how_much_memory_links_may_take_is_a_setting() -> None:
    assert open_files(Settings(url_memory_mb=64)).kept.maxsize == 64_000_000
    with pytest.raises(ValidationError, match="url_memory_mb"):
        Settings(url_memory_mb=63)  # ten images of one request must find room


def test_the_same_image_is_kept_once(client: TestClient, app: FastAPI) -> None:
    for _ in range(3):
        link(client)
    assert len(app.state.files.kept) == 1


def test_a_secret_of_one_s_own_outlives_the_process_and_another_one_does_not(client: TestClient, app: FastAPI) -> None:
    app.state.files = Files(b"a secret of sixteen")
    url = link(client)
    app.state.files = Files(b"a secret of sixteen")
    assert_refused(client.get(url), 410, "not_kept")
    link(client)
    assert client.get(url).status_code == 200
    app.state.files = Files()
    assert_refused(client.get(url), 403, "bad_signature")


def test_a_link_names_the_public_address_or_the_host_that_was_asked(client: TestClient, app: FastAPI) -> None:
    lies = {"x-forwarded-host": "evil", "x-forwarded-proto": "https", "forwarded": "host=evil;proto=https"}
    assert link(client, {"host": "pictures:81", **lies}).startswith("http://pictures:81/files/")
    assert link(client, {"host": "no host/at?all"}).startswith("http://testserver/files/")
    app.state.files = Files(public_url="https://pictures.example/draw/")
    assert link(client, lies).startswith("https://pictures.example/draw/files/")


def test_raw_bytes_and_streams_have_no_place_for_a_link(client: TestClient) -> None:
    for answer in (
        client.post(PATH, json=BODY, headers={"accept": "image/png"}),
        client.post(PATH, json=BODY | {"stream": True}),
    ):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "response_format"


def test_a_known_tag_is_still_answered_with_a_fresh_link(client: TestClient) -> None:
    tag = client.post(PATH, json=BODY).headers["etag"]
    assert client.post(PATH, json=BODY, headers={"if-none-match": tag}).status_code == 200


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    """The application behind a real socket."""
    app.state.files = Files()
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", proxy_headers=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_an_unmodified_openai_client_gets_a_link_that_anybody_can_follow(address: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "a red circle", "extra_body": {"seed": 7}}
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        linked = client.images.generate(response_format="url", **body).data
        plain = client.images.generate(response_format="b64_json", **body).data
    assert linked
    assert plain
    assert linked[0].b64_json is None
    assert (linked[0].url or "").startswith(f"{address}/files/")
    answer = httpx.get(linked[0].url or "").raise_for_status()
    assert np.array_equal(pixels(answer.content), pixels(base64.b64decode(plain[0].b64_json or "")))
    assert httpx.head(linked[0].url or "").headers["content-length"] == str(len(answer.content))

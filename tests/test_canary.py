"""A canary prompt and a canary key go through success, error and crash, and are found nowhere they do not belong."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.conftest import Server, start_server
from tests.test_tracing import Receiver
from tests.tiny_video import build_tiny_video

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the Triton wheel exists for Linux alone")

PATH = "/v1/images/generations"
PROMPT = "canary flies over a red circle"
KEY = "fs-canary-key-0123456789abcdef"
HEADERS = {"authorization": f"Bearer {KEY}", "x-request-id": "bird-1"}
SOUGHT = ("canary", "Canary", PROMPT.encode().hex(), "Y2FuYXJ5")  # plain, and as hexadecimal and base64 would show it


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()


@pytest.fixture(scope="module")
def server(bundled_repository: Path, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled student, and one of videos."""
    repository = tmp_path_factory.mktemp("canary")
    shutil.copytree(bundled_repository, repository, dirs_exist_ok=True)
    build_tiny_video(repository)
    server = start_server(repository, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    yield server
    if server.process.poll() is None:
        server.stop()


def clean(where: str, text: str | bytes) -> None:
    told = text.decode("latin-1") if isinstance(text, bytes) else text
    for word in SOUGHT:
        assert word not in told, f"{where}: …{told[max(0, told.index(word) - 200) :][:400]}"


SUCCESSES: list[dict[str, Any]] = [{}, {"n": 2}, {"stream": True, "partial_images": 2}, {"output_format": "webp"}]
ERRORS: list[bytes] = [
    json.dumps({"prompt": [PROMPT]}).encode(),
    json.dumps({"prompt": {"text": PROMPT}}).encode(),
    json.dumps([PROMPT]).encode(),
    json.dumps(PROMPT).encode(),
    json.dumps({"promt": PROMPT}).encode(),
    json.dumps({"prompt": PROMPT * 1000}).encode(),
    json.dumps({"prompt": f"{PROMPT} a" * 12}).encode(),
    json.dumps({"prompt": PROMPT, "steps": 9}).encode(),
    json.dumps({"prompt": PROMPT, "steps": 1, "num_inference_steps": 2}).encode(),
    json.dumps({"prompt": PROMPT, "model": "no-such"}).encode(),
    json.dumps({"prompt": "a", "negative_prompt": PROMPT}).encode(),
    json.dumps({"prompt": "a", "negative_prompt": [PROMPT]}).encode(),
    f'{{"prompt": "{PROMPT}", "prompt": "{PROMPT}"}}'.encode(),
    f'{{"prompt": "{PROMPT}'.encode(),
    f'{{"prompt": "{PROMPT}\\ud800"}}'.encode(),
    f'{{"prompt": "{PROMPT}\xff"}}'.encode("latin-1"),
    json.dumps({"prompt": PROMPT, "filler": "x" * 2_000_000}).encode(),
]


def test_no_prompt_and_no_key_is_in_any_log_metric_trace_error_or_image(server: Server, receiver: Receiver) -> None:
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        for changes in SUCCESSES:
            answer = client.post(PATH, json={"prompt": PROMPT, "seed": 1} | changes)
            assert answer.status_code == 200
            clean("a success", answer.content)
            clean("headers", str(answer.headers))
        raw = client.post(PATH, json={"prompt": PROMPT}, headers={"accept": "image/png"})
        clean("a picture", raw.content)
        clean("its metadata", str(Image.open(io.BytesIO(raw.content)).info))
        for body in ERRORS:
            answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
            assert 400 <= answer.status_code < 500, body[:80]
            clean(f"the error of {body[:40]!r}", answer.content)
            clean("headers", str(answer.headers))
        video(client)
        crash(client, server)
        clean("metrics", client.get("/metrics").text)
    assert server.stop() == 0
    log = server.log.read_text()
    clean("the log", log)
    clean("the traces", b"".join(receiver.raw))
    lines = [json.loads(line) for line in log.splitlines()]
    assert {200, 400, 404, 413, 503} <= {line["status"] for line in lines if line["logger"] == "fewstep.request"}
    assert any(line["logger"] == "fewstep" for line in lines), "the crash itself is logged"
    assert receiver.spans


def video(client: httpx.Client) -> None:
    """By form and by JSON: files, events and errors. The object itself shows its owner what was asked."""
    form = {"prompt": (None, PROMPT), "partial_images": (None, "1")}
    job = client.post("/v1/videos", files=form).json()
    events = client.get(f"/v1/videos/{job['id']}/events").text
    assert "event: video.completed" in events
    clean("events", events.replace(f'"prompt":"{PROMPT}"', ""))
    for query in ("", "?format=webp", "?format=gif", "?variant=thumbnail"):
        content = client.get(f"/v1/videos/{job['id']}/content{query}")
        assert content.status_code == 200
        clean(f"the content{query}", content.content)
        clean("headers", str(content.headers))
    for changes in ({"seconds": PROMPT}, {"fps": 1}, {"negative_prompt": PROMPT}, {"prompt": PROMPT * 100}, {PROMPT[:6]: 1}):
        asked = {"prompt": PROMPT} | changes
        for sent in ({"json": asked}, {"files": {name: (None, str(value)) for name, value in asked.items()}}):
            answer = client.post("/v1/videos", **sent)
            assert answer.status_code == 400
            if changes not in ({"seconds": PROMPT}, {PROMPT[:6]: 1}):  # fields that hold no prompt are shown as they came
                clean(f"the error of {changes}", answer.content)
    file = client.post("/v1/videos", files={"prompt": (PROMPT, PROMPT)})
    assert file.status_code == 400
    clean("the error of a file", file.content)


def crash(client: httpx.Client, server: Server) -> None:
    """Kills the process that makes the images, sends requests until one has felt it, and waits for the server to mend."""
    end, statuses = time.monotonic() + 30, set()
    (stub,) = (child for child in server.children() if b"/scenes/" in Path(f"/proc/{child}/cmdline").read_bytes())
    os.kill(stub, signal.SIGKILL)
    while 503 not in statuses or 200 not in statuses:
        assert time.monotonic() < end, statuses
        answer = client.post(PATH, json={"prompt": PROMPT, "seed": 2})
        if answer.status_code != 200:
            clean("the error of a crash", answer.content)
            statuses = {503}
        statuses.add(answer.status_code)
        time.sleep(0.05)
    with contextlib.suppress(httpx.HTTPError):
        client.get("/readyz")

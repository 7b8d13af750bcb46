"""/openapi.json is true: schemathesis draws legal and illegal requests from it, and every check of every answer passes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from server.gateway.keys import create
from server.gateway.responses import CompletedImage, PartialImage
from server.gateway.video_responses import VideoCompleted, VideoInProgress, VideoPartialImage, VideoQueued
from tests.conftest import Server, start_server
from tests.tiny_student import build_tiny_student, write_manifest
from tests.tiny_video import build_tiny_video

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small students that read as many tokens as a legal prompt can have: a limit in tokens is none a document can say."""
    repository = tmp_path_factory.mktemp("schemathesis")
    for student in (build_tiny_student(repository), build_tiny_video(repository)):
        manifest = json.loads((student / "1" / "student.json").read_text())
        tokenizer = manifest["tokenizers"][0] | {"length": manifest["max_prompt_characters"] + 1}
        write_manifest(student, manifest | {"tokenizers": [tokenizer]})
    return repository


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    server = start_server(repository, "inprocess")
    yield server
    assert server.stop() == 0


def schemathesis(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """One run with every check."""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(TESTS / "schemathesis.toml"), "run", *arguments]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [*command, "--checks", "all"], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def drawn(run: "subprocess.CompletedProcess[str]") -> int:
    """How many requests were sent, all of which passed."""
    assert run.returncode == 0, run.stdout + run.stderr
    (counts,) = re.findall(r"(\d+) generated, (\d+) passed", run.stdout)
    assert counts[0] == counts[1], run.stdout
    return int(counts[0])


def test_every_check_passes(server: Server) -> None:
    assert drawn(schemathesis(f"{server.url}/openapi.json")) > 300


def test_every_check_passes_through_triton(triton_server: Server) -> None:
    assert drawn(schemathesis(f"{triton_server.url}/openapi.json", "--phases", "examples,fuzzing")) > 100


def test_every_check_passes_on_a_server_that_asks_for_keys(repository: Path, tmp_path: Path) -> None:
    scopes = ["images", "videos", "models", "metrics"]
    key = create(tmp_path / "keys.json", "schemathesis", scopes, None, None, None)
    server = start_server(repository, "inprocess", "--keys-file", str(tmp_path / "keys.json"))
    authorized = {"Authorization": f"Bearer {key}"}
    document = httpx.get(f"{server.url}/openapi.json", headers=authorized).json()
    secured = {path for path, operations in document["paths"].items() for one in operations.values() if one.get("security")}
    videos = {
        f"/v1/videos{path}"
        for path in ("", "/sync", *(f"/{{video_id}}{more}" for more in ("", "/cancel", "/content", "/events")))
    }
    assert secured == videos | {"/v1/images/generations", "/v1/models", "/v1/models/{model}", "/v1/model_info", "/metrics"}
    assert drawn(schemathesis(f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {key}")) > 300
    assert server.stop() == 0


def test_an_untrue_document_is_caught(server: Server, tmp_path: Path) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    del document["paths"]["/v1/models/{model}"]["get"]["responses"]["404"]
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    run = schemathesis(str(tmp_path / "openapi.json"), "--url", server.url, "--include-path", "/v1/models/{model}")
    assert run.returncode == 1
    assert "Undocumented status code" in run.stdout


def test_the_document_says_what_this_server_s_students_can_do(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    image = document["paths"]["/v1/images/generations"]["post"]
    fields: dict[str, Any] = image["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields["size"]["enum"] == ["64x64", "64x32", "auto", None]
    assert fields["num_inference_steps"]["enum"] == [1, 2, 3, 4, None]
    assert fields["seed"]["anyOf"][0]["maximum"] == 2**64 - 1
    assert fields["prompt"]["maxLength"] == 100
    assert "422" not in json.dumps(document)
    kinds = {"application/json", "image/png", "image/jpeg", "image/webp", "text/event-stream"}
    assert set(image["responses"]["200"]["content"]) == kinds
    for operations in document["paths"].values():
        for operation in operations.values():
            assert all("x-request-id" in answer["headers"] for answer in operation["responses"].values())


def test_the_document_says_which_videos_can_be_made(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path in ("/v1/videos", "/v1/videos/sync"):
        bodies = document["paths"][path]["post"]["requestBody"]["content"]
        fields = {kind: body["schema"]["properties"] for kind, body in bodies.items()}
        assert set(fields) == {"application/json", "multipart/form-data"}
        assert fields["application/json"]["seconds"]["enum"] == ["3.125", 3.125, None]
        assert fields["multipart/form-data"]["seconds"]["enum"] == ["3.125", 3.125], "a form has no null"
        assert fields["application/json"]["num_frames"]["enum"] == [25, None]
        assert fields["application/json"]["fps"]["enum"] == [8, None]
        assert fields["application/json"]["model"]["enum"] == ["tiny-video", None]
    assert {"200", "206", "304", "404", "410", "416"} <= set(
        document["paths"]["/v1/videos/{video_id}/content"]["get"]["responses"]
    )


def test_events_of_a_video_are_those_of_the_document(server: Server) -> None:
    body = {"prompt": "a", "partial_images": 2}
    video = httpx.post(f"{server.url}/v1/videos", json=body).json()
    answer = httpx.get(f"{server.url}/v1/videos/{video['id']}/events", timeout=60)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    kinds = [
        type(TypeAdapter(VideoQueued | VideoInProgress | VideoPartialImage | VideoCompleted).validate_json(one))
        for one in events
    ]
    assert kinds[-1] is VideoCompleted


def test_events_of_a_stream_are_those_of_the_document(server: Server) -> None:
    body = {"prompt": "a", "seed": 7, "stream": True, "partial_images": 3, "n": 2}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body)
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    events = [TypeAdapter(PartialImage | CompletedImage).validate_json(line) for line in data]
    assert [type(event) for event in events].count(CompletedImage) == 2

"""A PNG made by fewstep can be made again, and says what has changed when it cannot."""

import itertools
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fewstep import app
from server.gateway.png import write_png
from server.generate import generate_file
from server.metadata import read_metadata
from server.replay import replay
from tests.conftest import Server

PROMPT = "a red circle"


def generate(out: Path, repository: Path, embed_prompt: bool = False, trace: Path | None = None) -> Path:
    generate_file(PROMPT, out, 7, 2, None, None, repository, embed_prompt, trace)
    return out


def test_a_picture_made_here_is_made_again_to_the_bit(tiny_repository: Path, tmp_path: Path) -> None:
    file = generate(tmp_path / "out.png", tiny_repository, embed_prompt=True)
    assert replay(file, None, tiny_repository).lines[1:] == ("bit-identical",)


def test_a_picture_of_the_running_server_is_made_again_to_the_bit(
    triton_server: Server, bundled_repository: Path, tmp_path: Path
) -> None:
    body = {"prompt": PROMPT, "seed": 5, "n": 1, "image_index": 3, "num_inference_steps": 3}
    url = f"{triton_server.url}/v1/images/generations"
    answer = httpx.post(url, json=body, headers={"accept": "image/png"}, timeout=60).raise_for_status()
    (tmp_path / "out.png").write_bytes(answer.content)
    assert replay(tmp_path / "out.png", PROMPT, bundled_repository).identical


def test_the_prompt_is_in_the_file_only_if_that_was_asked_for(tiny_repository: Path, tmp_path: Path) -> None:
    plain = generate(tmp_path / "plain.png", tiny_repository)
    assert PROMPT.encode() not in plain.read_bytes()
    with pytest.raises(ValueError, match="pass --prompt"):
        replay(plain, None, tiny_repository)
    assert replay(plain, PROMPT, tiny_repository).identical
    embedded = generate(tmp_path / "embedded.png", tiny_repository, embed_prompt=True)
    assert PROMPT.encode() in embedded.read_bytes()
    with pytest.raises(ValueError, match="another prompt"):
        replay(embedded, "a blue square", tiny_repository)


def test_another_prompt_is_not_identical(tiny_repository: Path, tmp_path: Path) -> None:
    outcome = replay(generate(tmp_path / "out.png", tiny_repository), "a big blue square", tiny_repository)
    assert not outcome.identical
    assert "the prompt must be another" in outcome.lines[-1]


def test_the_part_of_the_fingerprint_that_changed_is_named(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.0.0")
    file = generate(tmp_path / "out.png", tiny_repository, embed_prompt=True)
    monkeypatch.undo()
    outcome = replay(file, None, tiny_repository)
    assert outcome.identical
    assert len(outcome.lines) == 3
    assert "differs in onnxruntime: 1.0.0 then" in outcome.lines[2]


def test_a_painted_over_picture_is_not_identical_and_says_why(tiny_repository: Path, tmp_path: Path) -> None:
    file = generate(tmp_path / "out.png", tiny_repository, embed_prompt=True)
    said, pixels = read_metadata(file)
    painted = pixels.copy()
    painted[:32] = 255 - painted[:32]
    file.write_bytes(write_png(painted, said.text()))
    result = CliRunner().invoke(app, ["replay", str(file), "--model-repository", str(tiny_repository)])
    assert result.exit_code == 1
    assert "50.0% of the pixels differ" in result.stdout
    assert "changed after it was made" in result.stdout


@pytest.mark.parametrize("kind", ["foreign", "text"])
def test_a_file_that_fewstep_did_not_make_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "file.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file) if kind == "foreign" else file.write_text("no picture")
    result = CliRunner().invoke(app, ["replay", str(file)])
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_trace_shows_every_stage_and_each_nfe(tiny_repository: Path, tmp_path: Path) -> None:
    generate(tmp_path / "out.png", tiny_repository, trace=tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    stages = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in stages] == ["text_encoder", "noise", "nfe1", "nfe2", "vae_decoder"]
    assert all(later["ts"] >= earlier["ts"] + earlier["dur"] for earlier, later in itertools.pairwise(stages))

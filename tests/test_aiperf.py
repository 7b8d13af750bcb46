"""An unmodified NVIDIA AIPerf against the real server, by the README's own commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Server

INSTALLED = Path(sys.prefix) / "aiperf" / "bin" / "aiperf"
REQUESTS = 20
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def profile(server: Server, folder: Path, *more: str, kind: str = "image") -> dict[str, Any]:
    """AIPerf's own report on a run in `folder`, which is its home as well."""
    assert INSTALLED.exists(), "AIPerf is not installed: run `make aiperf`"
    images, videos = (block for block in BLOCKS if "aiperf profile" in block)
    files = images.partition(".venv/aiperf")[0]
    script = images if kind == "image" else files + videos.replace("--model motion", "--model tiny-video")
    script = script.replace(".venv/aiperf/bin/aiperf", str(INSTALLED)).replace("http://127.0.0.1:8000", server.url)
    script = script.replace("cp model_repository", f"cp {ROOT}/model_repository").rstrip() + " " + " ".join(more)
    # With HF_HUB_OFFLINE it would refuse a local tokenizer folder.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HOME": str(folder), "HF_HOME": str(folder / "huggingface")}
    run = subprocess.run(
        ["bash", "-ec", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report: dict[str, Any] = json.loads((folder / "aiperf" / "results" / "profile_export_aiperf.json").read_text())
    return report


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--streaming", "--extra-inputs", "partial_images:2"]], ids=["plain", "streaming"])
def test_it_measures_every_request_without_an_error(triton_server: Server, tmp_path: Path, more: list[str]) -> None:
    report = profile(triton_server, tmp_path, *more)
    assert report["is_complete"]
    assert report["error_summary"] == []
    assert report["request_error_rate"]["avg"] == 0
    assert report["request_count"]["avg"] == report["completed_request_count"]["avg"] == REQUESTS
    assert report["usage_prompt_tokens"]["min"] == report["usage_prompt_tokens"]["max"] == 8
    assert report["usage_completion_tokens"]["avg"] == 64
    latency, duration = report["request_latency"], report["benchmark_duration"]["avg"] * 1000
    assert 1 < latency["min"] <= latency["p50"] <= latency["p99"] <= latency["max"] < duration
    assert latency["avg"] * REQUESTS <= 2.1 * duration  # two at a time
    assert not more or report["http_req_chunks_received"]["avg"] > 1


@pytest.mark.slow
def test_it_makes_waits_for_and_downloads_every_video(clips_server: Server, tmp_path: Path) -> None:
    report = profile(clips_server, tmp_path, kind="video")
    assert report["is_complete"]
    assert report["error_summary"] == []
    assert report["request_error_rate"]["avg"] == 0
    assert report["request_count"]["avg"] == report["completed_request_count"]["avg"] == 8
    assert report["video_inference_time"]["min"] > 0
    assert report["video_peak_memory"]["min"] > 10

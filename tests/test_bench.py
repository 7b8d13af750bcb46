"""Every benchmark runs with one command and ends in one line of JSON that says what was measured, and on what."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fewstep import app
from tdm_train.denoiser import Text
from tests.tiny_student import build_tiny_student
from tests.tiny_video import build_tiny_video


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nfe", "--runs", "3"], {"law", "stages", "samples"}),
        (["determinism", "--trials", "16"], {"trials", "failures", "control_caught", "strict_failures", "strict_cost"}),
        (["overload", "--seconds", "0.5"], {"capacity", "loads", "goodput_of_peak"}),
        (["fairness", "--rounds", "1", "--seconds", "0.5"], {"capacity", "calm", "flood", "others_p95_ratio"}),
        (["sessions", "--rounds", "1"], {"median", "bits_equal_across_threads"}),
        (["encoders", "--rounds", "1", "--side", "16"], {"rows", "held", "hop_ms", "json_ms"}),
        (["scheduler", "--rounds", "1", "--seconds", "0.1"], {"overhead", "share_of_best_static", "one_nfe_p99_ratio"}),
        (["gateway", "--images", "3", "--rounds", "1", "--seconds", "0.3"], {"ms", "images_per_second", "overheads"}),
    ],
)
def test_a_benchmark_ends_in_one_json_document(bundled_repository: Path, arguments: list[str], told: set[str]) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments, "--model-repository", str(bundled_repository)])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["benchmark"] == arguments[0]
    assert {"student", "fingerprint"} | told <= set(document)


def test_the_interference_benchmark_measures_images_with_and_without_a_video(tmp_path: Path) -> None:
    build_tiny_student(tmp_path)
    build_tiny_video(tmp_path)
    command = ["bench", "interference", "--rounds", "2", "--images", "20", "--model-repository", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert (document["benchmark"], document["student"], document["video"]) == ("interference", "tiny", "tiny-video")
    assert [len(samples) for samples in document["samples_ms"].values()] == [40, 40]
    assert document["videos"] >= 1
    assert document["longest_piece_ms"] >= document["video_nfe_ms"]["max"] > 0


def test_the_stages_of_a_video_end_with_its_file(clips_repository: Path) -> None:
    command = ["bench", "nfe", "--runs", "3", "--student", "tiny-video", "--model-repository", str(clips_repository)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout.splitlines()[-1])["stages"])[-1] == "video_encode"


def test_the_interference_benchmark_needs_a_student_of_videos(bundled_repository: Path) -> None:
    result = CliRunner().invoke(
        app, ["bench", "interference", "--video", "none", "--model-repository", str(bundled_repository)]
    )
    assert result.exit_code == 1
    assert "no student of videos is named 'none' here" in result.stderr


def test_the_training_benchmark_measures_every_variant() -> None:
    result = CliRunner().invoke(app, ["bench", "training", "--rounds", "1", "--width", "64", "--layers", "1"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["benchmark"] == "training"
    assert set(document["iterations_per_second"]) == set(document["peak_mebibytes"])
    assert min(document["iterations_per_second"].values()) > 0


def test_what_the_training_benchmark_does_not_save_changes_no_prediction() -> None:
    """The variants without savings do more of the same work, and nothing else."""
    from benchmarks.training import Unbatched

    teacher = torch.nn.Module()
    teacher.forward = lambda x_t, t, text, nfe=None: (x_t * t[:, None] + text.emb[:, 0], x_t - text.emb[:, 0])
    x_t, t, text = torch.randn(4, 3), torch.rand(4), Text(torch.randn(4, 1, 3))
    expected, found = teacher(x_t, t, text), Unbatched(teacher)(x_t, t, text)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_student_that_varies_with_the_batch_fails_the_determinism_benchmark(
    bundled_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import determinism

    opened = determinism.open_engine
    monkeypatch.setattr(determinism, "open_engine", lambda *arguments: determinism.control_of(opened(*arguments), "fast"))
    result = CliRunner().invoke(app, ["bench", "determinism", "--trials", "32", "--model-repository", str(bundled_repository)])
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["failures"] > 0


@pytest.mark.slow
def test_the_export_benchmark_proves_what_it_measures() -> None:
    result = CliRunner().invoke(app, ["bench", "export", "--model", "pixart-xl-2", "--layers", "1", "--tensorrt"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["benchmark"] == "export"
    assert document["prove"]["passed"]
    assert document["prove"]["largest_error"] > 0
    assert document["build_engine"]["computes_in"] == "fp16"
    for stage in ("make_weights", "export", "prove", "build_engine"):
        assert document[stage]["peak_bytes"] >= document[stage]["peak_own_bytes"] > 1e8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "flux"], "model 'flux', legal: pixart-xl-2, sdxl-unet, cogvideox-2b"),
        (["--precision", "fp8"], "precision 'fp8', legal"),
        (["--precision", "bf16"], "cannot be proven at full size"),
        (["--model", "sdxl-unet", "--layers", "1"], "legal for it: none"),
    ],
)
def test_the_export_benchmark_refuses_what_it_cannot_measure(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "export", *arguments])
    assert result.exit_code == 1
    assert said in result.stderr

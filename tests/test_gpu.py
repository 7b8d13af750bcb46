"""The GPU benchmark's own arithmetic, on a device of numpy memory; its numbers come from a GPU alone."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.gpu import measured, peaks, print_table
from fewstep import app
from server.engine.engine import Engine
from server.engine.student import open_student
from tests.fakes import FakeRuntime


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny student reads twelve tokens."""
    for module in ("nfe", "gpu"):
        monkeypatch.setattr(f"benchmarks.{module}.PROMPTS", ("a red circle", "a blue square"))


def test_a_device_that_computes_like_the_processor_is_no_bit_away_from_it(
    tiny_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_repository / "tiny"
    engine = Engine.of(open_student(folder), "fast", "cuda", FakeRuntime())
    rates = {"flops": 1e9, "bytes": 1e12}
    said = measured(engine, Engine.open(folder, provider="cpu"), folder, 3, rates)
    assert said["parity"] == {
        "latents_largest": 0.0,
        "latents_mean": 0.0,
        "levels_largest": 0,
        "pixels_that_differ": 0.0,
        "same_bits_again": True,
    }
    assert list(said["nfe"]) == ["1", "2", "4", "8", "16"]
    assert said["nfe"]["16"]["floor"] == pytest.approx(16 * said["nfe"]["1"]["floor"])
    product = 2 * 6 * 4  # the tiny student has one, of [1, 6] and [6, 4]
    assert said["nfe"]["1"]["tflop"] == product / 1e12
    print_table({"student": "tiny", "parts": engine.fingerprint_parts, "runs": 3} | said)
    assert "has the same bits" in capsys.readouterr().out


def test_without_rates_there_is_no_floor(tiny_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_repository / "tiny"
    engine = Engine.of(open_student(folder), "fast", "cuda", FakeRuntime())
    said = measured(engine, Engine.open(folder, provider="cpu"), folder, 3, None)
    assert {row["floor"] for row in said["nfe"].values()} == {None}
    print_table({"student": "tiny", "parts": engine.fingerprint_parts, "runs": 3} | said)
    assert "unknown" in capsys.readouterr().out


def test_without_a_gpu_the_benchmark_says_so_in_one_line(tiny_repository: Path) -> None:
    if peaks("fp32"):
        pytest.skip("a GPU is here")
    result = CliRunner().invoke(app, ["bench", "gpu", "--model-repository", str(tiny_repository)])
    assert result.exit_code == 1
    assert "no NVIDIA GPU can be used here" in result.stderr
    assert result.stderr.count("\n") == 1
    other = CliRunner().invoke(app, ["bench", "gpu", "--provider", "cpu", "--model-repository", str(tiny_repository)])
    assert "--provider 'cpu': legal are cuda, tensorrt" in other.stderr

"""Every benchmark runs with one command and ends in one line of JSON that says what was measured, and on what."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fewstep import app


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


def test_a_student_that_varies_with_the_batch_fails_the_determinism_benchmark(
    bundled_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import determinism

    opened = determinism.open_engine
    monkeypatch.setattr(determinism, "open_engine", lambda *arguments: determinism.control_of(opened(*arguments), "fast"))
    result = CliRunner().invoke(app, ["bench", "determinism", "--trials", "32", "--model-repository", str(bundled_repository)])
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["failures"] > 0

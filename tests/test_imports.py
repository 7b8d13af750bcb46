"""Imports go one way (see the architecture): serving knows neither training nor torch, the gateway one seam to the engine."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft"}
SEAM = {"backend.py", "inprocess_backend.py", "triton_backend.py"}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", sources("server"), ids=str)
def test_serving_imports_neither_training_nor_its_libraries(path: Path) -> None:
    assert not packages(path) & (HEAVY | {"tdm_train", "export", "benchmarks", "tests"})


@pytest.mark.parametrize("path", sources("server/gateway"), ids=str)
def test_the_gateway_reaches_the_engine_through_its_seam_alone(path: Path) -> None:
    assert "onnxruntime" not in packages(path)
    if path.name not in SEAM:
        assert not [name for name in imported(path) if name.startswith("server.engine")]


@pytest.mark.parametrize("path", sources("server/engine"), ids=str)
def test_the_engine_knows_no_http(path: Path) -> None:
    assert not packages(path) & {"fastapi", "starlette", "uvicorn", "httpx", "tritonclient"}
    assert not [name for name in imported(path) if name.startswith("server.gateway")]
    assert ("triton_python_backend_utils" in packages(path)) == (path.name in ("triton_model.py", "triton_metrics.py"))


@pytest.mark.parametrize("path", sources("server/jobs"), ids=str)
def test_jobs_know_neither_http_nor_students(path: Path) -> None:
    assert not packages(path) & {"fastapi", "starlette", "uvicorn", "httpx", "tritonclient", "onnxruntime"}
    assert not [name for name in imported(path) if name.startswith(("server.gateway", "server.engine"))]


@pytest.mark.parametrize("path", [*sources("export"), *sources("tdm_train")], ids=str)
def test_nobody_imports_the_benchmarks_and_training_does_not_import_export(path: Path) -> None:
    allowed = {"benchmarks"} | ({"export", "server"} if "tdm_train" in path.parts else set())
    assert not packages(path) & allowed


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after running `code`."""
    script = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    )


def test_making_a_picture_loads_no_training_library(tiny_repository: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from server.generate import generate_file
from server.gateway.app import create_app
generate_file("a", Path({str(tmp_path / "out.png")!r}), 1, None, None, None, Path({str(tiny_repository)!r}))"""
    assert not loaded_after(code) & HEAVY


def test_the_gateway_in_front_of_triton_loads_no_runtime() -> None:
    loaded = loaded_after("import server.gateway.app, server.gateway.serve, server.gateway.triton_backend")
    assert not loaded & (HEAVY | {"onnxruntime", "tokenizers"})


def test_the_command_loads_nothing_heavy_before_it_knows_what_to_do() -> None:
    assert not loaded_after("import fewstep") & (HEAVY | {"onnxruntime", "fastapi", "numpy"})

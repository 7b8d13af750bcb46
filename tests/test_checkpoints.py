"""A run that is killed goes on as if it had not been, to the bit; what cannot be written or resumed is said."""

import multiprocessing
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tdm_train.recipes import RECIPES
from tdm_train.run import Run
from tdm_train.tdm_recipe import TdmRecipe
from tests.miniatures import PROMPTS, T5_LENGTH, save_miniature

ITERATIONS = 12


def tiny_recipe(folder: Path, **changes: Any) -> TdmRecipe:
    """A few iterations of the PixArt miniature with a checkpoint after each."""
    small = {"sizes": ("16x16",), "text_length": T5_LENGTH, "iterations": ITERATIONS, "batch": 1, "accumulation": 1, "rank": 2}
    files = {"teacher": str(folder / "teacher"), "prompts": str(folder / "prompts.txt")}
    return replace(RECIPES["tdm"], **{**small, **files, "checkpoint_minutes": 0.0, "student_lr": 1e-3, "ema": 0.5, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_miniature("pixart_sigma", folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def train(recipe: TdmRecipe, out: Path) -> None:
    """The work of a process of its own."""
    from tdm_train.trainer import train_tdm

    torch.set_num_threads(1)
    train_tdm(recipe, out, resume=True)


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that begin with the libraries imported: seconds saved for each that is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tdm_train.trainer", "tests.test_checkpoints"])
    first = context.Process(target=int)
    first.start()
    first.join()  # the imports are done, and no run's time includes them
    return context


def run_for(seconds: float, processes: Any, recipe: TdmRecipe, out: Path) -> int:
    """The exit code of a run that is killed after so many seconds."""
    process = processes.Process(target=train, args=(recipe, out))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def state(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a finished run: what is trained of both roles, optimisers, schedules, averages, and the student."""
    found: dict[str, torch.Tensor] = {}
    (last,) = (out / "checkpoints").iterdir()
    assert last.name == f"{ITERATIONS:09d}"
    for file in sorted(last.glob("*.bin")) + sorted(last.glob("custom*.pkl")):
        flatten(file.name, torch.load(file, weights_only=True), found)
    for file in sorted((out / "student").rglob("*.safetensors")):
        flatten(str(file.relative_to(out)), load_file(file), found)
    return found


def flatten(name: str, value: Any, into: dict[str, torch.Tensor]) -> None:
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            flatten(f"{name}/{key}", item, into)
    elif isinstance(value, torch.Tensor | int | float):
        into[name] = torch.as_tensor(value)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(
    weights: str, folder: Path, processes: Any
) -> None:
    recipe, whole, cut = tiny_recipe(folder, weights=weights), folder / f"{weights}-whole", folder / f"{weights}-cut"
    began = time.monotonic()
    assert run_for(120, processes, recipe, whole) == 0
    seconds, draw, kills = time.monotonic() - began, random.Random(weights), 0
    while kills < 4 and not (cut / "student").exists():
        kills += run_for(draw.uniform(0.1, 0.8) * seconds, processes, recipe, cut) == -signal.SIGKILL
    assert kills >= 2
    assert run_for(120, processes, recipe, cut) == 0
    expected, found = state(whole), state(cut)
    assert expected.keys() == found.keys()
    assert {name for name in expected if not torch.equal(expected[name], found[name])} == set()
    assert any("optimizer_1" in name for name in expected)  # the fake score's


@dataclass(frozen=True)
class Recipe:
    iterations: int = 3
    seed: int = 0


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full after `size` bytes: a file cannot grow beyond them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_the_last_checkpoint_survives_it(tmp_path: Path) -> None:
    run = Run(tmp_path, Recipe(), resume=False)
    run.prepare(torch.nn.Linear(64, 64), lr=0.1, warmup=1, ema=0.9)
    run.checkpoints.save(1)
    before = {file.name: file.read_bytes() for file in (tmp_path / "checkpoints" / "000000001").iterdir()}
    said = r"step 2 could not be written, as on a full disk .*000000001 is whole: make room and go on with --resume"
    with files_of_at_most(5000), pytest.raises(OSError, match=said):
        run.checkpoints.save(2)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before
    resumed = Run(tmp_path, Recipe(), resume=True)
    resumed.prepare(torch.nn.Linear(64, 64), lr=0.1, warmup=1, ema=0.9)
    assert resumed.checkpoints.load() == 1
    resumed.checkpoints.save(2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000002"]


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path, Recipe(), resume=False)
    run.prepare(torch.nn.Linear(2, 2), lr=0.1, warmup=1, ema=0.0)
    run.checkpoints.save(1)
    (tmp_path / "checkpoints" / ".partial").mkdir()
    (tmp_path / "checkpoints" / ".partial" / "optimizer.bin").write_bytes(b"half")
    assert run.checkpoints.load() == 1


@pytest.mark.parametrize(("change", "said"), [({"iterations": 4}, "iterations=3, not 4"), ({"seed": 1}, "seed=0, not 1")])
def test_a_run_is_not_resumed_by_another_recipe(change: dict[str, int], said: str, tmp_path: Path) -> None:
    Run(tmp_path, Recipe(), resume=False).checkpoints.save(1)
    with pytest.raises(ValueError, match=f"is of a run with {said}: resume with that, or begin another run"):
        Run(tmp_path, replace(Recipe(), **change), resume=True)

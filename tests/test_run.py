"""Training runs: resumable, data-parallel, and clear about what they refuse."""

import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from typer.testing import CliRunner

from fewstep import app, with_changes
from tdm_train.recipes import RECIPES
from tdm_train.run import Run, cosine, launch


class InterruptionError(Exception):
    """Stands for a killed process."""


@dataclass(frozen=True)
class LineRecipe:
    iterations: int
    seed: int = 0


def train_line(out: Path, iterations: int, resume: bool, stop_at: int | None = None, chance: bool = False) -> None:
    """Fits a line; with `stop_at` it saves and dies before that step; with `chance`, to points from every generator."""
    run = Run(out, LineRecipe(iterations), resume)
    torch.manual_seed(1)
    module = torch.nn.Linear(2, 1)
    wrapped, optimizer = run.prepare(module, lr=0.1, warmup=2, ema=0.9)
    for step in run.steps():
        if step == stop_at:
            run.checkpoints.save(step)
            raise InterruptionError
        x = torch.full((4, 2), float(step % 3))
        if chance:
            x = torch.randn(4, 2) + np.random.randn() + random.random()
        loss = (wrapped(x).float() - x.sum(1, keepdim=True)).square().mean()
        run.update(loss, wrapped, optimizer)
        run.end_step(loss=float(loss.detach()))
    if run.rank == 0:
        average = run.averages[0][0].module
        save_file({"weight": module.weight.detach(), "average": average.weight.detach()}, out / "line.safetensors")


@pytest.mark.parametrize(
    ("capability", "precision", "warned"), [("AVX2", "bf16", True), ("AVX2", "no", False), ("AVX512", "bf16", False)]
)
def test_a_processor_without_fast_bf16_is_told_of_before_hours_are_lost(
    capability: str,
    precision: str,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    Run(tmp_path, LineRecipe(1), resume=False, precision=precision)
    assert ("--set precision=no" in capsys.readouterr().err) == warned


def test_a_resumed_run_ends_with_the_same_weights_as_an_uninterrupted_one(tmp_path: Path) -> None:
    train_line(tmp_path / "whole", 12, resume=False, chance=True)
    with pytest.raises(InterruptionError):
        train_line(tmp_path / "cut", 12, resume=False, stop_at=7, chance=True)
    train_line(tmp_path / "cut", 12, resume=True, chance=True)
    whole, cut = (load_file(tmp_path / name / "line.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_two_processes_with_the_same_data_train_like_one(tmp_path: Path) -> None:
    train_line(tmp_path / "one", 8, resume=False)
    launch(train_line, 2, tmp_path / "two", 8, False)
    one, two = (load_file(tmp_path / name / "line.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def save_gathered(out: Path) -> None:
    """Cuts a line up as FSDP does, and puts it together again."""
    run = Run(out, LineRecipe(1), resume=False, precision="no")
    torch.manual_seed(1)
    module = fully_shard(torch.nn.Linear(4, 3), mesh=init_device_mesh("cpu", (run.processes,)))
    shard = module.weight.to_local().clone()
    assert list(run.steps()) == [0]  # what is cut up is whole again only after the last step
    run.gather(module)
    save_file({"weight": module.weight.detach(), "shard": shard}, out / f"{run.rank}.safetensors")


def test_parameters_that_were_cut_up_are_put_together_again(tmp_path: Path) -> None:
    launch(save_gathered, 2, tmp_path)
    torch.manual_seed(1)
    whole = torch.nn.Linear(4, 3).weight
    for rank in (0, 1):
        saved = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(saved["weight"], whole)
        assert len(saved["shard"]) < len(whole)


def test_the_fsdp_file_has_only_what_accelerate_knows() -> None:
    file = Path(__file__).parent.parent / "tdm_train" / "fsdp.yaml"
    configuration = ClusterConfig.from_yaml_file(str(file))
    assert configuration.distributed_type == DistributedType.FSDP
    legal = {parameter.removeprefix("fsdp_") for parameter in signature(FullyShardedDataParallelPlugin).parameters}
    said = {name.removeprefix("fsdp_") for name in configuration.fsdp_config}
    assert said - {"version"} <= legal


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    factors = [cosine(step, 100, 10) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == max(factors) == 1
    assert factors[100] == pytest.approx(0, abs=1e-6)
    assert all(earlier >= later for earlier, later in itertools.pairwise(factors[10:]))


def test_a_recipe_takes_changes_of_its_own_fields_alone() -> None:
    before = replace(RECIPES["motion_tdm"])
    changed = with_changes(RECIPES["motion_tdm"], ["iterations=7", "nfe=(1, 4)", "teacher=somewhere"])
    assert (changed.iterations, changed.nfe, changed.teacher) == (7, (1, 4), "somewhere")
    assert replace(changed, iterations=before.iterations, nfe=before.nfe, teacher=before.teacher) == before
    assert RECIPES["motion_tdm"] == before


def test_changes_that_are_legal_together_alone_are_taken_in_any_order() -> None:
    changes = ["ladder_iterations=5", "ladder=[16, 8]", "last_timestep=899", "random_landing=True"]
    for order in (changes, changes[::-1]):
        changed = with_changes(RECIPES["scenes_tdm"], order)
        assert (changed.ladder, changed.last_timestep, changed.random_landing) == ((16, 8), 899.0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope", "--out", "x"], "recipe 'nope' is not one of scenes_evaluator, scenes_vae, scenes_text_encoder,"),
        (["scenes_tdm", "--out", "x", "--set", "stepz=4"], "legal are field=value with a field of name, teacher"),
        (["scenes_tdm", "--out", "x", "--set", "iterations=many"], "iterations takes int values"),
        (["scenes_tdm", "--out", "x", "--set", "iterations=2.5"], "iterations takes int values"),
        (["scenes_tdm", "--out", "x", "--set", "random_landing=1"], "random_landing takes bool values"),
        (["scenes_tdm", "--out", "x", "--set", "rho=huber"], "rho='huber', legal: one of huber_elementwise, huber_vector, mse"),
        (["scenes_tdm", "--out", "x", "--set", "teacher=/nowhere"], "is not a diffusers folder"),
    ],
)
def test_a_bad_run_is_refused_in_one_line_before_any_work(arguments: list[str], said: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path) if argument == "x" else argument for argument in arguments]
    result = CliRunner().invoke(app, ["train", *arguments, "--processes", "1"])
    assert result.exit_code == 1
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_second_run_in_the_same_folder_asks_for_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    result = CliRunner().invoke(app, ["train", "scenes_tdm", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "pass --resume to go on with it" in result.stderr


def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from tests.test_run import report_and_sleep
from tdm_train.run import launch
if __name__ == "__main__":
    launch(report_and_sleep, 2, Path({str(tmp_path)!r}))
"""
    (tmp_path / "parent.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=environment)
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    parent.kill()
    parent.wait()
    workers = [int(file.stem) for file in tmp_path.glob("*.pid")]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_a_worker_that_starts_only_after_its_parent_was_killed_ends_too() -> None:
    code = "import os, time; from tdm_train.run import _worker; _worker(0, os.getpid(), 1, 0, time.sleep, (60,))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=50).returncode == 1


def report_and_sleep(folder: Path) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(300)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for a condition that must come true; fails when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)

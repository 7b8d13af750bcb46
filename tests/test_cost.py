"""What a run is said to cost is what it does cost."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fewstep import app
from tdm_train.backbones import backbone_of
from tdm_train.checkpoint import denoiser_of, open_pipeline
from tdm_train.cost import TFLOPS, UTILISATION, cost_of, evaluation_flops, weightless_pipeline
from tdm_train.recipes import RECIPES
from tdm_train.roles import full_copies, shared_roles
from tdm_train.tdm_recipe import TdmRecipe
from tests.miniatures import CLIP_LENGTH, FRAMES, HEIGHT, PROMPTS, T5_LENGTH, WIDTH

NAMES = ["pixart_sigma", "stable_diffusion", "sdxl", "sd3", "cogvideox_2b", "cogvideox_5b"]


def recipe_of(name: str, teacher: Path, **changes: Any) -> TdmRecipe:
    length = CLIP_LENGTH if name in ("stable_diffusion", "sdxl") else T5_LENGTH
    video = {"frames": FRAMES, "fps": 8} if "cogvideox" in name else {}
    small = {"sizes": (f"{WIDTH}x{HEIGHT}",), "text_length": length, "rank": 2, "gradient_checkpointing": False}
    return replace(RECIPES["tdm"], teacher=str(teacher), **{**small, **video, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_flops_without_weights_are_those_of_a_real_evaluation(name: str, miniatures: Callable[[str], Path]) -> None:
    recipe, real = recipe_of(name, miniatures(name)), open_pipeline(miniatures(name))
    shape = (1, *backbone_of(real).latent_shape(real, WIDTH, HEIGHT, recipe.frames or None))
    text = backbone_of(real).encode(real, PROMPTS[:1], recipe.text_length)
    # PyTorch's counter knows nothing of the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser_of(real)(torch.randn(shape), torch.tensor([500.0]), text)
    pipeline = weightless_pipeline(recipe)
    assert evaluation_flops(pipeline, denoiser_of(pipeline).to("meta"), recipe, shape, False) == counter.get_total_flops() > 0


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_parameters_and_bytes_are_those_of_the_real_roles(weights: str, miniatures: Callable[[str], Path]) -> None:
    name = "pixart_sigma"
    recipe = recipe_of(name, miniatures(name), weights=weights, precision="no", ema=0.9)
    denoiser = denoiser_of(open_pipeline(miniatures(name))).requires_grad_(False)
    plain = sum(parameter.numel() for parameter in denoiser.parameters())
    _, student, fake = (full_copies if weights == "full" else shared_roles)(denoiser, recipe)
    said = {role.role: role for role in cost_of(recipe, 1).roles}
    assert (said["teacher"].parameters, said["teacher"].trained, said["teacher"].total) == (plain, 0, 4 * plain)
    for role, real, averaged in (("student", student, True), ("fake score", fake, False)):
        count = sum(parameter.numel() for parameter in real.parameters() if parameter.requires_grad)
        assert said[role].trained == count
        optimizer = torch.optim.AdamW([parameter for parameter in real.parameters() if parameter.requires_grad])
        for parameter in real.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim > 0]
        assert said[role].optimiser == sum(value.numel() * value.element_size() for value in moments)
        assert said[role].total == (4 + 4 + 8 + 4 * averaged) * count


def test_a_half_precision_base_takes_two_bytes_per_parameter(miniatures: Callable[[str], Path]) -> None:
    teacher = cost_of(recipe_of("sd3", miniatures("sd3")), 1).roles[0]
    assert teacher.weights == 2 * teacher.parameters


def test_evaluations_follow_the_k_set_the_ladder_and_the_regulariser(miniatures: Callable[[str], Path]) -> None:
    base = recipe_of("pixart_sigma", miniatures("pixart_sigma"), nfe=(1, 2, 3, 4), iterations=20)
    assert cost_of(base, 1).forwards == 1.75 + 5
    assert cost_of(replace(base, nfe=(4,)), 1).forwards == 2.5 + 5
    assert cost_of(replace(base, nfe=(4,), fake_loss="velocity"), 1).forwards == 2.5 + 6
    assert cost_of(replace(base, shares=(3, 1, 1, 1)), 1).forwards == 1.5 + 5
    twice = cost_of(replace(base, nfe=(4,), fake_updates=2), 1)
    assert (twice.forwards, twice.backwards) == (2 * (2.5 + 1) + 4, 3)
    laddered = replace(base, nfe=(4,), ladder=(8,), ladder_iterations=10)
    assert cost_of(laddered, 1).forwards == 3.5 + 5


def test_flops_grow_with_the_batch_the_processes_and_checkpointing(miniatures: Callable[[str], Path]) -> None:
    base = recipe_of("pixart_sigma", miniatures("pixart_sigma"), batch=2, accumulation=3)
    cost = cost_of(base, 1)
    assert cost.samples == 6
    assert cost_of(base, 4).flops == pytest.approx(4 * cost.flops)
    assert cost_of(replace(base, gradient_checkpointing=True), 1).flops > 1.05 * cost.flops
    assert cost.hours("a800") == cost.flops * base.iterations / (TFLOPS["a800"] * 1e12 * UTILISATION * 3600)


def test_the_dry_run_needs_no_weights_and_prints_all_of_it(tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    teacher = shutil.copytree(miniatures("sdxl"), tmp_path / "teacher")
    for file in teacher.rglob("*.safetensors"):
        file.unlink()
    changes = ["--set", f"teacher={teacher}", "--set", "sizes=('32x32','48x32')"]
    result = CliRunner().invoke(app, ["train", "tdm_sdxl", "--dry-run", "--gpu", "a800", "--processes", "2", *changes])
    assert result.exit_code == 0, result.stderr
    for said in ("guidance = 8.0", "fake score", "7.5 forwards, 2 backwards", "2000 iterations on one a800 at 35%", "on 2"):
        assert said in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scenes_vae", "--dry-run"], "--dry-run is of distillations alone"),
        (["tdm", "--dry-run"], "teacher='', legal: a diffusers folder"),
        (["scenes_tdm"], "--out FOLDER is missing"),
    ],
)
def test_what_has_no_cost_is_refused(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 1
    assert said in result.stderr

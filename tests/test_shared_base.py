"""LoRA: one network under three roles, and files of its student that others open."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from export.reference import on_grid
from tdm_train.backbones import backbone_of
from tdm_train.checkpoint import denoiser_of, load_student, open_pipeline
from tdm_train.denoiser import Text
from tdm_train.lora import fuse_adapter
from tdm_train.recipes import RECIPES
from tdm_train.roles import full_copies, lora_config, shared_roles
from tdm_train.shared_base import SharedRole
from tdm_train.student_folder import write_student
from tdm_train.tdm_recipe import TdmRecipe
from tdm_train.trainer import train_tdm
from tests.miniatures import CLIP_LENGTH, FRAMES, HEIGHT, PROMPTS, T5_LENGTH, WIDTH

LOADED_BY_DIFFUSERS = ("stable_diffusion", "sdxl", "sd3", "cogvideox_2b", "cogvideox_5b")
T = torch.tensor([700.0, 300.0])


def recipe_for(name: str, teacher: Path, **changes: Any) -> TdmRecipe:
    length = CLIP_LENGTH if name in ("stable_diffusion", "sdxl") else T5_LENGTH
    video = {"frames": FRAMES, "fps": 8} if "cogvideox" in name else {}
    small = {"rank": 2, "alpha": 3, "precision": "no", "nfe": (1, 2), "sizes": (f"{WIDTH}x{HEIGHT}",), "text_length": length}
    return replace(RECIPES["tdm"], teacher=str(teacher), prompts="p", **{**small, **video, **changes})


def shared(name: str, teacher: Path, **changes: Any) -> tuple[Any, TdmRecipe, tuple[SharedRole, ...]]:
    pipeline, recipe = open_pipeline(teacher), recipe_for(name, teacher, **changes)
    return pipeline, recipe, shared_roles(denoiser_of(pipeline).requires_grad_(False), recipe)


def inputs(pipeline: Any, recipe: TdmRecipe) -> tuple[torch.Tensor, Text]:
    shape = backbone_of(pipeline).latent_shape(pipeline, WIDTH, HEIGHT, recipe.frames or None)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return noise, backbone_of(pipeline).encode(pipeline, PROMPTS, recipe.text_length)


def move(role: SharedRole, seed: int, far: float = 0.3) -> None:
    """Moves a role off the teacher, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.own:
            parameter += far * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart_sigma", "stable_diffusion", "sd3"])
def test_each_role_has_its_own_adapter_and_the_teacher_none(name: str, miniatures: Callable[[str], Path]) -> None:
    pipeline, recipe, (teacher, student, fake) = shared(name, miniatures(name))
    plain = denoiser_of(open_pipeline(miniatures(name)))
    noise, text = inputs(pipeline, recipe)
    nfe = torch.tensor([1, 2])
    expected = plain(noise, T, text)[0]
    for role in (teacher, student, fake):
        torch.testing.assert_close(role(noise, T, text, nfe)[0], expected)  # an adapter begins as nothing
    move(student, 1)
    move(fake, 2)
    seen = [role(noise, T, text, nfe)[0] for role in (student, teacher, fake, teacher, student)]
    torch.testing.assert_close(seen[1], expected)
    assert torch.equal(seen[1], seen[3])
    assert torch.equal(seen[0], seen[4])
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)
    assert not torch.allclose(seen[0], expected, atol=1e-3)


def test_the_base_is_held_once_and_roles_own_their_adapters_alone(miniatures: Callable[[str], Path]) -> None:
    pipeline, _, (teacher, student, fake) = shared("pixart_sigma", miniatures("pixart_sigma"))
    network = pipeline.transformer
    assert teacher.base is student.base is fake.base
    assert teacher.base.denoiser.network is network
    base = {parameter.data_ptr() for parameter in network.parameters() if not parameter.requires_grad}
    own = [{parameter.data_ptr() for parameter in role.own} for role in (teacher, student, fake)]
    assert own[0] == set()
    assert not own[1] & own[2]
    assert not (own[1] | own[2]) & base
    plain = open_pipeline(miniatures("pixart_sigma")).transformer
    assert len(base) == len(list(plain.parameters()))
    layers = 2 * 2 * 4  # two blocks, two attentions each, four targets
    assert len(student.own) == len(fake.own) == 2 * layers + 1
    trained = sum(parameter.numel() for role in (student, fake) for parameter in role.parameters())
    held = sum(parameter.numel() for parameter in network.parameters())
    vectors = sum(role.own[-1].numel() for role in (student, fake))
    assert held + vectors == sum(parameter.numel() for parameter in plain.parameters()) + trained


def test_a_half_precision_base_trains_float32_adapters(miniatures: Callable[[str], Path]) -> None:
    _, _, (teacher, student, _) = shared("stable_diffusion", miniatures("stable_diffusion"), precision="bf16")
    assert {parameter.dtype for parameter in student.own} == {torch.float32}
    frozen = [value for name, value in teacher.base.denoiser.network.named_parameters() if "lora" not in name]
    assert {value.dtype for value in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_students_gradient_is_its_own_whoever_acted_since(checkpointing: bool, miniatures: Callable[[str], Path]) -> None:
    name = "pixart_sigma"
    pipeline, recipe, (teacher, student, fake) = shared(name, miniatures(name), gradient_checkpointing=checkpointing)
    noise, text = inputs(pipeline, recipe)
    move(student, 1)
    move(fake, 2)
    gradients = []
    for others in ((), (fake, teacher)):
        x0, _ = student(noise, T, text, torch.tensor([1, 2]))
        with torch.no_grad():
            for other in others:
                other(noise, T, text, torch.tensor([1, 2]))
        x0.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in student.own])
        assert all(parameter.grad is None for parameter in fake.own)
        student.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(bool(gradient.any()) for gradient in gradients[0])


def test_gradient_checkpointing_changes_no_gradient(miniatures: Callable[[str], Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        teacher, recipe = open_pipeline(miniatures("sd3")), recipe_for("sd3", miniatures("sd3"))
        roles = full_copies(denoiser_of(teacher), replace(recipe, gradient_checkpointing=checkpointing, weights="full"))
        noise, text = inputs(teacher, recipe)
        roles[1](noise, T, text, torch.tensor([1, 2]))[0].square().mean().backward()
        found = [parameter.grad for parameter in roles[1].parameters() if parameter.grad is not None]
        gradients.append(torch.nn.utils.parameters_to_vector(found))
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED_BY_DIFFUSERS)
def test_diffusers_samples_the_adapter_on_the_base_to_the_fused_students_latents(
    name: str, tmp_path: Path, miniatures: Callable[[str], Path]
) -> None:
    start = 1000.0 if name == "sd3" else 749.0  # at 999 a prediction of epsilon magnifies rounding by 1/a = 15
    _, recipe, (_, role, _) = shared(name, miniatures(name), last_timestep=start)
    move(role, 1, far=0.05)
    write_student(recipe, role, tmp_path, torch.float32)
    student = load_student(tmp_path / "student")
    lora = DiffusionPipeline.from_pretrained(miniatures(name), scheduler=student.pipeline.scheduler)
    base_latents = sample(lora, student, recipe)
    lora.load_lora_weights(str(tmp_path / "student"), weight_name="pytorch_lora_weights.safetensors")
    from_adapter = sample(lora, student, recipe)
    fused = DiffusionPipeline.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(from_adapter, sample(fused, student, recipe), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(from_adapter, base_latents, atol=1e-3)


def sample(pipeline: Any, student: Any, recipe: TdmRecipe) -> torch.Tensor:
    """The pipeline's own latents in two steps on the student's grid."""
    noise, _ = inputs(student.pipeline, recipe)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_frames": FRAMES} if recipe.frames else {}
    options |= {} if recipe.text_length == CLIP_LENGTH else {"max_sequence_length": recipe.text_length}
    with on_grid(replace(student, pipeline=pipeline), 2):
        result = pipeline(
            PROMPTS,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=2,
            guidance_scale=1.0,
            latents=noise.clone(),
            output_type="latent",
            return_dict=False,
            **options,
        )
    return result[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_sigma", "stable_diffusion"])
def test_the_fused_student_is_the_trained_role_at_every_k(name: str, tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    pipeline, recipe, (_, role, _) = shared(name, miniatures(name))
    move(role, 1)
    write_student(recipe, role, tmp_path, torch.float32)
    student = load_student(tmp_path / "student")
    assert student.description.adapter_scale == 1.0
    noise, text = inputs(pipeline, recipe)
    for nfe in (1, 2):
        with torch.no_grad():
            ours = role(noise, T, text, torch.full((2,), nfe))[0]
            theirs = student.denoiser(noise, T, text, torch.full((2,), nfe))[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with safe_open(tmp_path / "student" / "pytorch_lora_weights.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(key.startswith(f"{backbone_of(pipeline).NETWORK}.") for key in file.keys())  # noqa: SIM118
    assert (said[f"{backbone_of(pipeline).NETWORK}.r"], said[f"{backbone_of(pipeline).NETWORK}.lora_alpha"]) == (2, 3)


def test_an_adapter_of_a_convolution_fuses_to_what_peft_computes() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1))
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1))
    plain.load_state_dict(network.state_dict())
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), network, adapter_name="a")
    adapter = {name.replace(".a.", "."): value for name, value in network.named_parameters() if ".a." in name}
    for value in adapter.values():
        torch.nn.init.normal_(value)
    picture = torch.randn(1, 3, 4, 4)
    expected = network(picture)
    fuse_adapter(plain, {name: value.detach() for name, value in adapter.items()}, 3.0)
    torch.testing.assert_close(plain(picture), expected)


@pytest.mark.slow
def test_training_by_lora_moves_the_student_and_only_its_adapter(tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    name, changes = "pixart_sigma", {"iterations": 2, "batch": 2, "accumulation": 1, "student_lr": 1e-2}
    recipe = replace(recipe_for(name, miniatures(name), precision="bf16"), prompts=str(tmp_path / "prompts.txt"), **changes)
    train_tdm(recipe, tmp_path / "run", resume=False)
    student = load_student(tmp_path / "run" / "student")
    before = open_pipeline(miniatures(name)).transformer.state_dict()
    changed = {
        name
        for name, value in student.pipeline.transformer.state_dict().items()
        if name in before and not torch.allclose(value, before[name], atol=2e-3)
    }
    assert changed
    assert all(name.endswith((*(f"{target}.weight" for target in recipe.targets), "linear_2.bias")) for name in changed)


def test_the_adapters_configuration_is_the_recipes() -> None:
    config = lora_config(TdmRecipe(rank=8, alpha=16))
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 16, {"to_q", "to_k", "to_v", "to_out.0"})

"""Teacher, student and fake score: three networks, or three roles of one."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch import nn

from tdm_train.checkpoint import denoiser_of, load_student
from tdm_train.denoiser import Denoiser
from tdm_train.description import Description, read_description
from tdm_train.run import Run
from tdm_train.schedule import NoiseSchedule
from tdm_train.shared_base import SharedBase, SharedRole
from tdm_train.steps_aware import make_steps_aware
from tdm_train.tdm_recipe import TdmRecipe

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Role = Denoiser | SharedRole


@dataclass(frozen=True)
class Roles:
    """The three roles, and what trains two of them: `*_step` is the module to call when gradients are wanted."""

    teacher: Role
    student: Role
    fake_score: Role
    student_step: nn.Module
    fake_step: nn.Module
    student_optimizer: torch.optim.Optimizer
    fake_optimizer: torch.optim.Optimizer

    @property
    def schedule(self) -> NoiseSchedule:
        return self.student.schedule

    @staticmethod
    def of(pipeline: Any, recipe: TdmRecipe, run: Run) -> "Roles":
        """Student and fake score start as the teacher, or the student as `recipe.start`."""
        denoiser = denoiser_of(pipeline).requires_grad_(False).to(run.device)
        refuse_under_fsdp(recipe, run)
        teacher, student, fake_score = (full_copies if recipe.weights == "full" else shared_roles)(denoiser, recipe)
        if recipe.start:
            student.load_state_dict(load_student(Path(recipe.start)).denoiser.state_dict())
        adamw = {"betas": tuple(recipe.betas), "weight_decay": 0.0}
        student_step, student_optimizer = run.prepare(student, recipe.student_lr, recipe.warmup, recipe.ema, **adamw)
        fake_step, fake_optimizer = run.prepare(fake_score, recipe.fake_lr, recipe.warmup, 0.0, **adamw)
        return Roles(teacher, student, fake_score, student_step, fake_step, student_optimizer, fake_optimizer)


def full_copies(teacher: Denoiser, recipe: TdmRecipe) -> tuple[Role, Role, Role]:
    """Three networks, two of which train all of their weights."""
    student, fake_score = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher).requires_grad_(True)
    for denoiser in (student, fake_score):
        if recipe.steps_aware:
            make_steps_aware(denoiser.network, (*recipe.nfe, *recipe.ladder))
        if recipe.gradient_checkpointing:
            denoiser.network.enable_gradient_checkpointing()
    return teacher, student, fake_score


def refuse_other_start(recipe: TdmRecipe, description: Description) -> None:
    """Raises ValueError for a student to start from that is not of what the recipe makes. description: of the one it makes."""
    started, names = read_description(Path(recipe.start)), ("base", "revision", "family", "nfe", "k_conditioning")
    for name in names:
        if (found := getattr(started, name)) != (wanted := getattr(description, name)):
            raise ValueError(f"start={recipe.start!r} is a student with {name}={found!r}, legal here: {wanted!r}")


def shared_roles(denoiser: Denoiser, recipe: TdmRecipe) -> tuple[Role, Role, Role]:
    """One frozen network with an adapter for each of two roles."""
    if recipe.gradient_checkpointing:
        denoiser.network.enable_gradient_checkpointing()
    nfe_set = (*recipe.nfe, *recipe.ladder) if recipe.steps_aware else ()
    base = SharedBase(denoiser, lora_config(recipe), nfe_set, DTYPES[recipe.precision])
    return SharedRole(base, "teacher"), SharedRole(base, "student"), SharedRole(base, "fake_score")


def lora_config(recipe: TdmRecipe) -> LoraConfig:
    return LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets))


def refuse_under_fsdp(recipe: TdmRecipe, run: Run) -> None:
    """Raises ValueError for what needs a network in one piece, where FSDP cuts it up."""
    if run.accelerator.distributed_type == DistributedType.FSDP and (recipe.weights == "lora" or recipe.ema > 0):
        raise ValueError(f"weights={recipe.weights} and ema={recipe.ema} under FSDP, legal: weights=full and ema=0.0")


def refuse_beyond(schedule: NoiseSchedule, recipe: TdmRecipe) -> None:
    """Raises ValueError for grids that start above the schedule's last timestep, or are shifted under alphas_cumprod."""
    if schedule.alphas_cumprod is not None and recipe.shift != 1:
        raise ValueError(f"shift={recipe.shift}, legal for {schedule.prediction_type}: 1, as only flows are shifted")
    last = schedule.train_timesteps - (schedule.alphas_cumprod is not None)
    for nfe in (*recipe.nfe, *recipe.ladder):
        if recipe.grid(nfe)[-1] > last:
            raise ValueError(
                f"the grid of {nfe} NFE starts at {recipe.grid(nfe)[-1]:g}, legal: up to {last} for {schedule.prediction_type}"
            )

"""TDM: the loop, readable from top to bottom. In every iteration the fake score learns first, then the student."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tdm_train.backbones import backbone_of
from tdm_train.backbones.sizes import pixel_scale
from tdm_train.checkpoint import denoiser_of, open_pipeline, save_student
from tdm_train.denoiser import Denoiser, Text
from tdm_train.description import Description
from tdm_train.losses import (
    importance_weight,
    student_loss,
    teacher_regulariser,
    velocity_loss,
    warm_up_loss,
    x0_minsnr_loss,
)
from tdm_train.prompts import encode_empty, encode_prompts
from tdm_train.query import Query, draw_landing, draw_tau, query
from tdm_train.rollout import guided_x0, rollout
from tdm_train.run import Run
from tdm_train.samplers import sampler_grid, student_sampler
from tdm_train.scenes.prompts import scenes_prompts
from tdm_train.schedule import NoiseSchedule
from tdm_train.steps_aware import make_steps_aware
from tdm_train.targets import fake_target
from tdm_train.tdm_recipe import TdmRecipe


def train_tdm(recipe: TdmRecipe, out: Path, resume: bool) -> None:
    """Distils `recipe.teacher` into a steps-aware student, from prompts alone, and saves `out/student`."""
    run = Run(out, recipe.iterations, recipe.seed, resume)
    pipeline = open_pipeline(recipe.teacher)
    roles, description = Roles.of(pipeline, recipe, run), describe(recipe, pipeline)
    prompts = Prompts.of(pipeline, recipe, description, run)
    for step in run.steps():
        with run.accelerator.autocast():
            batch = draw_batch(roles, prompts, recipe, run, step)
            fake_loss, importance = update_fake_score(roles, batch, recipe, run)
            update = warm_up_student if step < recipe.teacher_warmup else update_student
            loss = update(roles, batch, recipe, run)
        run.end_step(fake=fake_loss, student=loss, importance=importance)
    if run.rank == 0:
        save_student(pipeline, run.averages[0][0].module.network, description, out / "student")


@dataclass(frozen=True)
class Roles:
    """The three networks, and what trains two of them: `*_step` is the network to call when gradients are wanted."""

    teacher: Denoiser
    student: Denoiser
    fake_score: Denoiser
    student_step: nn.Module
    fake_step: nn.Module
    student_optimizer: torch.optim.Optimizer
    fake_optimizer: torch.optim.Optimizer

    @staticmethod
    def of(pipeline: Any, recipe: TdmRecipe, run: Run) -> "Roles":
        """Student and fake score start as the teacher."""
        teacher = denoiser_of(pipeline).requires_grad_(False).to(run.device)
        refuse_beyond(teacher.schedule, recipe)
        student, fake_score = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher).requires_grad_(True)
        adamw = {"betas": (0.0, 0.999), "weight_decay": 0.0}
        for denoiser in (student, fake_score):
            make_steps_aware(denoiser.network, (*recipe.nfe, *recipe.ladder))
        student_step, student_optimizer = run.prepare(student, recipe.student_lr, recipe.warmup, recipe.ema, **adamw)
        fake_step, fake_optimizer = run.prepare(fake_score, recipe.fake_lr, recipe.warmup, 0.0, **adamw)
        return Roles(teacher, student, fake_score, student_step, fake_step, student_optimizer, fake_optimizer)


def refuse_beyond(schedule: NoiseSchedule, recipe: TdmRecipe) -> None:
    """Raises ValueError for grids that start above the last of the schedule's timesteps."""
    last = schedule.train_timesteps - (schedule.alphas_cumprod is not None)
    for nfe in (*recipe.nfe, *recipe.ladder):
        if recipe.grid(nfe)[-1] > last:
            raise ValueError(
                f"the grid of {nfe} NFE starts at {recipe.grid(nfe)[-1]:g}, legal: up to {last} for {schedule.prediction_type}"
            )


@dataclass(frozen=True)
class Prompts:
    """Every prompt of the run, encoded, the empty one once per sample of a batch, and the shape of a batch's latents."""

    texts: Text
    empty: Text
    latent_shape: tuple[int, ...]

    @staticmethod
    def of(pipeline: Any, recipe: TdmRecipe, description: Description, run: Run) -> "Prompts":
        texts = encode_prompts(pipeline, scenes_prompts(recipe.prompts, recipe.seed), recipe.text_length)
        empty = encode_empty(pipeline, recipe.text_length).select(torch.zeros(recipe.batch, dtype=torch.int64)).to(run.device)
        width, height = map(int, description.sizes[0].split("x"))
        return Prompts(texts, empty, (recipe.batch, *backbone_of(pipeline).latent_shape(pipeline, width, height)))


@dataclass(frozen=True)
class Batch:
    """One step of a trajectory per sample: from `start` down to `landing` (timesteps [B]) on a grid from `terminal`.

    x_t, x0, eps: state at `start` and what the student predicted there, without gradients, float32 [B, C, h, w];
    nfe: int64 [B].
    """

    text: Text
    empty: Text
    nfe: torch.Tensor
    start: torch.Tensor
    landing: torch.Tensor
    terminal: torch.Tensor
    x_t: torch.Tensor
    x0: torch.Tensor
    eps: torch.Tensor


def draw_batch(roles: Roles, prompts: Prompts, recipe: TdmRecipe, run: Run, step: int) -> Batch:
    """Prompts and one K at random, the student's trajectories for them, and one step of each at random."""
    schedule, device, size = roles.student.schedule, run.device, recipe.batch
    rng = np.random.Generator(np.random.Philox(key=[recipe.seed, step * run.processes + run.rank]))
    rows = torch.from_numpy(rng.integers(len(prompts.texts.emb), size=size))
    text = prompts.texts.select(rows).to(device)
    nfe = int(rng.choice(recipe.nfe_at(step)))
    times = torch.tensor(recipe.grid(nfe), device=device)
    i = torch.from_numpy(rng.integers(1, nfe + 1, size=size)).to(device)
    trajectory = rollout(roles.student, schedule, torch.randn(prompts.latent_shape, device=device), text, times)
    start, landing = times[i], times[i - 1]
    if recipe.random_landing:
        landing = draw_landing(landing, start, torch.rand_like(start))
    return Batch(text, prompts.empty, torch.full_like(i, nfe), start, landing, times[-1], *trajectory.at(i))


def ask(roles: Roles, batch: Batch, x0: torch.Tensor, eps: torch.Tensor, recipe: TdmRecipe) -> Query:
    """The score query of a student's prediction at (batch.x_t, batch.start), at a random tau."""
    uniform = torch.rand_like(batch.start)
    tau = draw_tau(recipe.interval, batch.landing, batch.start, batch.terminal, uniform)
    return query(roles.student.schedule, x0, eps, batch.landing, tau, torch.randn_like(x0))


def update_fake_score(roles: Roles, batch: Batch, recipe: TdmRecipe, run: Run) -> tuple[float, float]:
    """Teaches the fake score where the student's trajectories are; the rollout's predictions save the student's forward.

    Returns the loss and the mean importance weight.
    """
    schedule, asked = roles.student.schedule, ask(roles, batch, batch.x0, batch.eps, recipe)
    target, importance = fake_target(recipe.fake_target, asked, schedule), importance_weight(asked, recipe.importance_clip)
    fake = roles.fake_step(asked.x_tau, asked.tau, batch.text, batch.nfe)
    loss_of = x0_minsnr_loss if recipe.fake_loss == "x0_minsnr" else velocity_loss
    loss = loss_of(fake, target, asked.tau, schedule, importance * target.weight)
    if recipe.fake_loss == "velocity" and recipe.teacher_weight > 0:
        with torch.no_grad():
            teacher = roles.teacher(asked.x_tau, asked.tau, batch.text)
        loss = loss + teacher_regulariser(fake, teacher, asked.tau, schedule, recipe.teacher_weight)
    run.update(loss, roles.fake_step, roles.fake_optimizer)
    return float(loss.detach()), float(importance.mean())


def update_student(roles: Roles, batch: Batch, recipe: TdmRecipe, run: Run) -> float:
    """Moves the student's x0 along teacher minus fake score, both asked at its own noised step; returns the loss."""
    asked = ask(roles, batch, *roles.student_step(batch.x_t, batch.start, batch.text, batch.nfe), recipe)
    x_tau = asked.x_tau.detach()
    with torch.no_grad():
        teacher_x0 = guided_x0(roles.teacher, x_tau, asked.tau, batch.text, batch.empty, recipe.guidance)
        fake_x0, _ = roles.fake_score(x_tau, asked.tau, batch.text, batch.nfe)
    loss = student_loss(asked, teacher_x0, fake_x0, recipe.rho)
    run.update(loss, roles.student_step, roles.student_optimizer)
    return float(loss.detach())


def warm_up_student(roles: Roles, batch: Batch, recipe: TdmRecipe, run: Run) -> float:
    """Regresses the student's x0 onto the guided teacher's at the student's own states; returns the loss."""
    x0, _ = roles.student_step(batch.x_t, batch.start, batch.text, batch.nfe)
    teacher_x0 = guided_x0(roles.teacher, batch.x_t, batch.start, batch.text, batch.empty, recipe.guidance)
    loss = warm_up_loss(x0, teacher_x0, recipe.rho)
    run.update(loss, roles.student_step, roles.student_optimizer)
    return float(loss.detach())


def describe(recipe: TdmRecipe, pipeline: Any) -> Description:
    """What student.json says of how the student of `pipeline` is made and must be run."""
    side = pipeline.transformer.config.sample_size * pixel_scale(pipeline)
    return Description(
        name="scenes",
        family=backbone_of(pipeline).FAMILY,
        base="fewstep scenes teacher",
        revision="1",
        nfe=sorted(recipe.nfe),
        default_nfe=max(recipe.nfe),
        text_length=recipe.text_length,
        sizes=[f"{side}x{side}"],
        timesteps=stated_grids(recipe, pipeline) or None,
        k_conditioning=True,
        adapter_scale=None,
        training={"method": "TDM (arXiv 2503.06674), steps-aware", **recipe.objective()},
    )


def stated_grids(recipe: TdmRecipe, pipeline: Any) -> dict[int, list[float]]:
    """NFE -> timesteps, falling, of the grids that are not the student's sampler's own."""
    sampler, stated = student_sampler(pipeline.scheduler), {}
    for nfe in recipe.nfe:
        times = recipe.grid(nfe)[:0:-1]
        if denoiser_of(pipeline).schedule.alphas_cumprod is not None:
            times = [float(int(t)) for t in times]  # of t only the whole part counts
        if not np.allclose(times, sampler_grid(sampler, nfe), rtol=0, atol=1e-3):
            stated[nfe] = times
    return stated

"""TDM: the loop, readable from top to bottom. In every iteration the fake score learns first, then the student."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tdm_train.backbones import backbone_named
from tdm_train.backbones.sizes import own_size
from tdm_train.checkpoint import denoiser_of, open_pipeline, pipeline_config
from tdm_train.denoiser import Text
from tdm_train.draws import draw, draw_nfe
from tdm_train.losses import (
    importance_weight,
    student_loss,
    teacher_regulariser,
    velocity_loss,
    warm_up_loss,
    x0_minsnr_loss,
)
from tdm_train.query import Query, draw_landing, draw_tau, query
from tdm_train.roles import Roles, lora_config, refuse_beyond, refuse_other_start
from tdm_train.rollout import guided_x0, rollout_to
from tdm_train.run import Run
from tdm_train.samples import Monitor
from tdm_train.shared_base import refuse_unknown_targets
from tdm_train.student_folder import describe, write_student
from tdm_train.targets import fake_target
from tdm_train.tdm_recipe import TdmRecipe
from tdm_train.texts import Texts, latent_shape, prompts_of


def train_tdm(recipe: TdmRecipe, out: Path, resume: bool) -> None:
    """Distils `recipe.teacher` into a steps-aware student, from prompts alone, and saves `out/student`."""
    prompts = prompts_of(recipe)
    refuse_other_family(recipe)
    run = Run(out, recipe, resume, recipe.checkpoint_minutes, recipe.precision, recipe.tracker)
    pipeline = open_pipeline(recipe.teacher, recipe.revision)
    refuse_what_the_teacher_cannot_do(recipe, pipeline)
    texts = Texts.of(pipeline, prompts, recipe, run)
    roles = Roles.of(pipeline, recipe, run)
    monitor = Monitor(texts.samples, roles, recipe, out)
    for step in run.steps():
        with run.accelerator.autocast():
            for turn in range(recipe.fake_updates):
                batches = draw_batches(pipeline, roles, texts, recipe, run, step, turn)
                fake_loss, importance = update_fake_score(roles, batches, recipe, run)
            loss = update_student(roles, batches, recipe, run, warm_up=step < recipe.teacher_warmup)
        run.end_step(fake=fake_loss, student=loss, importance=importance)
        if monitor.due(step):
            with run.accelerator.autocast():
                run.log(**monitor.look(step, write=run.rank == 0))
    run.gather(roles.student)
    if run.rank == 0:
        write_student(recipe, run.averaged(roles.student), out)


def refuse_other_family(recipe: TdmRecipe) -> None:
    """Raises ValueError for a teacher that is none, or is not of the family that the recipe's numbers are for."""
    if not recipe.teacher:
        raise ValueError("teacher='', legal: a diffusers folder, or a hub id such as owner/name: --set teacher=FOLDER")
    found = pipeline_config(recipe.teacher, recipe.revision)["_class_name"]
    if recipe.family and recipe.family != backbone_named(found).FAMILY:
        raise ValueError(f"{recipe.teacher} is a {found}, this recipe is for {recipe.family}; the recipe tdm is for any")


def refuse_what_the_teacher_cannot_do(recipe: TdmRecipe, pipeline: Any) -> None:
    """Raises ValueError for grids, targets or sizes that the opened teacher has no room for, and a `start` of another."""
    denoiser = denoiser_of(pipeline)
    refuse_beyond(denoiser.schedule, recipe)
    if recipe.weights == "lora":
        refuse_unknown_targets(denoiser.network, lora_config(recipe))
    for size in recipe.sizes or [own_size(pipeline)]:
        latent_shape(recipe, pipeline, size)
    description = describe(recipe, pipeline)
    if recipe.start:
        refuse_other_start(recipe, description)


@dataclass(frozen=True)
class Batch:
    """One step of a trajectory per sample: from `start` down to `landing` (timesteps [B]) on a grid from `terminal`.

    x_t, x0, eps: state at `start` and what the student predicted there, without gradients, float32 [B, C, h, w];
    nfe: int64 [B], `count` (K) for every sample; fake_noise, fake_tau, student_noise, student_tau: of the two score queries,
    as in Draws.
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
    fake_noise: torch.Tensor
    fake_tau: torch.Tensor
    student_noise: torch.Tensor
    student_tau: torch.Tensor
    count: int


def draw_batches(pipeline: Any, roles: Roles, texts: Texts, recipe: TdmRecipe, run: Run, step: int, turn: int) -> list[Batch]:
    """This process's micro-batches of the fake score's `turn` (0 ..) in an iteration, all of one K."""
    shape = latent_shape(recipe, pipeline, recipe.size_at(step) or own_size(pipeline))
    draws = step * recipe.fake_updates + turn
    nfe = draw_nfe(recipe.seed, draws, recipe.nfe_at(step), recipe.shares_at(step))
    first = run.rank * recipe.accumulation * recipe.batch
    starts = range(first, first + recipe.accumulation * recipe.batch, recipe.batch)
    return [draw_batch(roles, texts, recipe, draws, range(start, start + recipe.batch), nfe, shape) for start in starts]


def draw_batch(
    roles: Roles, texts: Texts, recipe: TdmRecipe, draws: int, samples: range, nfe: int, shape: tuple[int, ...]
) -> Batch:
    """Prompts at random, the student's trajectories for them, and one step of each at random."""
    device = texts.empty.emb.device
    drawn = draw(recipe.seed, draws, samples, len(texts.prompts.emb), nfe, shape, device)
    text, empty = Text.unpadded(texts.prompts.select(drawn.row.cpu()).to(device), texts.empty)
    times = torch.tensor(recipe.grid(nfe), device=device)
    state = rollout_to(roles.student, roles.schedule, drawn.noise, text, times, drawn.i)
    start, landing = times[drawn.i], times[drawn.i - 1]
    if recipe.random_landing:
        landing = draw_landing(landing, start, drawn.landing)
    queries = drawn.fake_noise, drawn.fake_tau, drawn.student_noise, drawn.student_tau
    return Batch(text, empty, torch.full_like(drawn.i, nfe), start, landing, times[-1], *state, *queries, count=nfe)


def ask(
    roles: Roles,
    batch: Batch,
    x0: torch.Tensor,
    eps: torch.Tensor,
    uniform: torch.Tensor,
    noise: torch.Tensor,
    recipe: TdmRecipe,
) -> Query:
    """The score query of a student's prediction at (batch.x_t, batch.start), at the tau that `uniform` [B] stands for."""
    shift = recipe.of_nfe(recipe.tau_shift, batch.count)
    tau = draw_tau(recipe.interval, batch.landing, batch.start, batch.terminal, uniform, shift)
    return query(roles.schedule, x0, eps, batch.landing, tau, noise)


def update_fake_score(roles: Roles, batches: list[Batch], recipe: TdmRecipe, run: Run) -> tuple[float, float]:
    """Teaches the fake score where the student's trajectories are; returns the loss and the mean importance weight."""
    losses, weights = [], []
    for batch in run.micro_batches(batches, roles.fake_step):
        loss, importance = fake_score_loss(roles, batch, recipe)
        run.accelerator.backward(loss / len(batches))
        losses.append(float(loss.detach()))
        weights.append(float(importance.mean()))
    run.step_optimizer(roles.fake_step, roles.fake_optimizer)
    return sum(losses) / len(losses), sum(weights) / len(weights)


def fake_score_loss(roles: Roles, batch: Batch, recipe: TdmRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """-> loss and importance weights [B]. The rollout's predictions save the student's forward."""
    asked = ask(roles, batch, batch.x0, batch.eps, batch.fake_tau, batch.fake_noise, recipe)
    target, importance = (
        fake_target(recipe.fake_target, asked, roles.schedule),
        importance_weight(asked, recipe.importance_clip),
    )
    fake = roles.fake_step(asked.x_tau, asked.tau, batch.text, batch.nfe)
    loss_of = x0_minsnr_loss if recipe.fake_loss == "x0_minsnr" else velocity_loss
    loss = loss_of(fake, target, asked.tau, roles.schedule, importance * target.weight)
    if recipe.fake_loss == "velocity" and recipe.teacher_weight > 0:
        with torch.no_grad():
            teacher = roles.teacher(asked.x_tau, asked.tau, batch.text)
        loss = loss + teacher_regulariser(fake, teacher, asked.tau, roles.schedule, recipe.teacher_weight)
    return loss, importance


def update_student(roles: Roles, batches: list[Batch], recipe: TdmRecipe, run: Run, warm_up: bool) -> float:
    """Moves the student by TDM's loss, or by the warm-up's; returns the loss."""
    losses = []
    for batch in run.micro_batches(batches, roles.student_step):
        loss = (warm_up_loss_of if warm_up else student_loss_of)(roles, batch, recipe)
        run.accelerator.backward(loss / len(batches))
        losses.append(float(loss.detach()))
    run.step_optimizer(roles.student_step, roles.student_optimizer)
    return sum(losses) / len(losses)


def student_loss_of(roles: Roles, batch: Batch, recipe: TdmRecipe) -> torch.Tensor:
    """The student's x0 against teacher minus fake score, both asked at its own noised step."""
    x0, eps = roles.student_step(batch.x_t, batch.start, batch.text, batch.nfe)
    asked = ask(roles, batch, x0, eps, batch.student_tau, batch.student_noise, recipe)
    x_tau = asked.x_tau.detach()
    guidance = recipe.guidance, recipe.of_nfe(recipe.guidance_until, batch.count)
    teacher_x0 = guided_x0(roles.teacher, x_tau, asked.tau, batch.text, batch.empty, *guidance)
    with torch.no_grad():
        fake_x0, _ = roles.fake_score(x_tau, asked.tau, batch.text, batch.nfe)
    return student_loss(asked, teacher_x0, fake_x0, recipe.rho)


def warm_up_loss_of(roles: Roles, batch: Batch, recipe: TdmRecipe) -> torch.Tensor:
    """The student's x0 against the guided teacher's at the student's own states."""
    x0, _ = roles.student_step(batch.x_t, batch.start, batch.text, batch.nfe)
    guidance = recipe.guidance, recipe.of_nfe(recipe.guidance_until, batch.count)
    teacher_x0 = guided_x0(roles.teacher, batch.x_t, batch.start, batch.text, batch.empty, *guidance)
    return warm_up_loss(x0, teacher_x0, recipe.rho)

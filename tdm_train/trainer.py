"""TDM: the loop, readable from top to bottom. In every iteration the fake score learns first, then the student."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdm_train.backbones import backbone_of
from tdm_train.backbones.sizes import pixel_scale
from tdm_train.checkpoint import denoiser_of, open_pipeline, save_student
from tdm_train.description import Description
from tdm_train.losses import fake_score_loss, student_loss
from tdm_train.prompts import encode_empty, encode_prompts
from tdm_train.recipes import TdmRecipe
from tdm_train.rollout import draw_tau, guided_x0, query, rollout
from tdm_train.run import Run
from tdm_train.scenes.prompts import scenes_prompts
from tdm_train.schedule import grid
from tdm_train.steps_aware import make_steps_aware


def train_tdm(recipe: TdmRecipe, out: Path, resume: bool) -> None:
    """Distils `recipe.teacher` into a steps-aware student, from prompts alone, and saves `out/student`."""
    run = Run(out, recipe.iterations, recipe.seed, resume)
    pipeline = open_pipeline(recipe.teacher)
    teacher = denoiser_of(pipeline).requires_grad_(False).to(run.device)
    student, fake_score = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher).requires_grad_(True)
    make_steps_aware(student.network, recipe.nfe)
    make_steps_aware(fake_score.network, recipe.nfe)
    student_step, student_optimizer = run.prepare(
        student, recipe.student_lr, recipe.warmup, recipe.ema, betas=(0.0, 0.999), weight_decay=0.0
    )
    fake_step, fake_optimizer = run.prepare(
        fake_score, recipe.fake_lr, recipe.warmup, 0.0, betas=(0.0, 0.999), weight_decay=0.0
    )
    texts = encode_prompts(pipeline, scenes_prompts(recipe.prompts, recipe.seed), recipe.text_length)
    empty = encode_empty(pipeline, recipe.text_length).select(torch.zeros(recipe.batch, dtype=torch.int64)).to(run.device)
    description = describe(recipe, pipeline)
    width, height = map(int, description.sizes[0].split("x"))
    shape = (recipe.batch, *backbone_of(pipeline).latent_shape(pipeline, width, height))

    for step in run.steps():
        rng = np.random.Generator(np.random.Philox(key=[recipe.seed, step * run.processes + run.rank]))
        rows = torch.from_numpy(rng.integers(len(texts.emb), size=recipe.batch))
        text = texts.select(rows).to(run.device)
        nfe = int(rng.choice(recipe.nfe))
        nfe_B, times = torch.full((recipe.batch,), nfe, device=run.device), torch.tensor(grid(nfe), device=run.device)
        i = torch.from_numpy(rng.integers(1, nfe + 1, size=recipe.batch)).to(run.device)
        start, landing = times[i], times[i - 1]
        with run.accelerator.autocast():
            trajectory = rollout(student, student.schedule, torch.randn(shape, device=run.device), text, nfe)
            x_t, x0, eps = trajectory.at(i)

            asked = query(student.schedule, x0, eps, landing, draw_tau(recipe.interval, landing, start))
            fake_x0, _ = fake_step(asked.x_tau, asked.tau, text, nfe_B)
            fake_loss = fake_score_loss(fake_x0, asked, student.schedule)
            run.update(fake_loss, fake_step, fake_optimizer)

            x0, eps = student_step(x_t, start, text, nfe_B)
            asked = query(student.schedule, x0, eps, landing, draw_tau(recipe.interval, landing, start))
            x_tau = asked.x_tau.detach()
            with torch.no_grad():
                teacher_x0 = guided_x0(teacher, x_tau, asked.tau, text, empty, recipe.guidance)
                fake_x0, _ = fake_score(x_tau, asked.tau, text, nfe_B)
            loss = student_loss(asked, teacher_x0, fake_x0)
            run.update(loss, student_step, student_optimizer)
        run.end_step(fake=float(fake_loss.detach()), student=float(loss.detach()))
    if run.rank == 0:
        save_student(pipeline, run.averages[0][0].module.network, description, out / "student")


def describe(recipe: TdmRecipe, pipeline: Any) -> Description:
    """What student.json says of how the student of `pipeline` is made and must be run."""
    side = pipeline.transformer.config.sample_size * pixel_scale(pipeline)
    return Description(
        name="scenes",
        family=backbone_of(pipeline).FAMILY,
        base="fewstep scenes teacher",
        revision="1",
        nfe=list(recipe.nfe),
        default_nfe=max(recipe.nfe),
        text_length=recipe.text_length,
        sizes=[f"{side}x{side}"],
        k_conditioning=True,
        adapter_scale=None,
        training={
            "method": "TDM (arXiv 2503.06674), steps-aware",
            "guidance": recipe.guidance,
            "interval": recipe.interval,
            "iterations": recipe.iterations,
            "batch": recipe.batch,
            "student_lr": recipe.student_lr,
            "fake_lr": recipe.fake_lr,
            "seed": recipe.seed,
        },
    )

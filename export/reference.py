"""What diffusers' own pipeline makes of a student: the reference that exported graphs are held to."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.families import FAMILIES
from export.sampler_table import start, take_stride
from tdm_train.checkpoint import Student
from tdm_train.steps_aware import fold, unfold


def diffusers_latents(student: Student, prompts: list[str], noise: torch.Tensor, nfe: int) -> NDArray[np.float32]:
    """The latents [B, ...] that a student's pipeline ends at from `noise` after `nfe` NFEs without guidance."""
    family = FAMILIES[student.description.family]
    with on_grid(student, nfe), plain_network(student, nfe):
        output = student.pipeline(
            prompts,
            num_inference_steps=nfe,
            guidance_scale=1.0,
            latents=noise.clone(),
            output_type="latent",
            return_dict=False,
            **family.call(student, noise.shape),
        )
    latents: NDArray[np.float32] = output[0].float().numpy()
    return latents


@contextmanager
def plain_network(student: Student, nfe: int) -> Iterator[None]:
    """Folds a steps-aware student into the plain network of one NFE count, for as long as the block runs."""
    if not student.description.k_conditioning:
        yield
        return
    vectors = fold(student.denoiser.network, nfe)
    try:
        yield
    finally:
        unfold(student.denoiser.network, vectors, nfe)


@contextmanager
def on_grid(student: Student, nfe: int) -> Iterator[None]:
    """Gives the pipeline a scheduler that stands on the student's grid already, and stays there, while the block runs."""
    given = student.pipeline.scheduler
    timesteps, sigmas = student.description.grid(nfe)
    started, strides = start(given, nfe, timesteps, sigmas)
    started.set_timesteps = lambda *arguments, **named: None
    if strides is not None:
        started.step = striding(started, strides)
    student.pipeline.scheduler = started
    try:
        yield
    finally:
        student.pipeline.scheduler = given


def striding(started: Any, strides: list[int]) -> Any:
    """The scheduler's step, going down by the next stride each time it is called."""
    step, left = started.step, iter(strides)

    @functools.wraps(step)  # the pipelines look at its parameters
    def stepped(*arguments: Any, **named: Any) -> Any:
        take_stride(started, next(left))
        return step(*arguments, **named)

    return stepped

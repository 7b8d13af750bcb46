"""What diffusers' own pipeline makes of a student: the reference that exported graphs are held to."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.families import FAMILIES
from export.sampler_table import start, take_stride
from tdm_train.checkpoint import Student
from tdm_train.steps_aware import fold, timestep_embedding, unfold


def diffusers_latents(student: Student, prompts: list[str], noise: torch.Tensor, nfe: int) -> NDArray[np.float32]:
    """The latents [B, ...] that a student's pipeline ends at from `noise` after `nfe` NFEs without guidance."""
    family = FAMILIES[student.description.family]
    with on_grid(student, nfe), plain_network(student, nfe), float32_outside(student.denoiser.network):
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
    network = student.denoiser.network
    embedding: Any = timestep_embedding(network)[1]
    bias: torch.Tensor = embedding.inner.linear_2.bias.detach().clone()
    vectors = fold(network, nfe)
    try:
        yield
    finally:
        unfold(network, vectors, nfe)
        embedding.inner.linear_2.bias.data.copy_(bias)  # unfolding rounds, in half precision by more than a little


@contextmanager
def float32_outside(network: nn.Module) -> Iterator[None]:
    """Keeps a half-precision network's latents and predictions in float32, as the exported graphs do, while the block runs.

    The pipelines alone would round the sampler's arithmetic too. Timesteps have one dimension at most and stay as they are.
    """
    dtype = next(network.parameters()).dtype

    def cast(value: Any) -> Any:
        rounds = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
        return value.to(dtype) if rounds else value

    def enter(module: nn.Module, told: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(cast, told)), {name: cast(value) for name, value in named.items()}

    def leave(module: nn.Module, told: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.float() for tensor in output)

    handles = [network.register_forward_pre_hook(enter, with_kwargs=True), network.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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

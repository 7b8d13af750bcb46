"""The student's trajectory, and the guided teacher. Equations: TDM, arXiv 2503.06674, section 3."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tdm_train.denoiser import Text
from tdm_train.schedule import NoiseSchedule, expand

Denoise = Callable[[torch.Tensor, torch.Tensor, Text, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Trajectory:
    """K steps of the student. Lists are indexed by i: `states[K]` is the noise, `states[0]` the finished latents;
    `predictions[i]` is (x0, eps) at `states[i]` (None at i = 0). All tensors are float32 [B, C, h, w]."""

    states: list[torch.Tensor]
    predictions: list[tuple[torch.Tensor, torch.Tensor] | None]

    def at(self, i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_t, x0, eps) of each sample b at its own step i[b] (int64 [B], 1 .. K)."""
        rows = torch.arange(len(i), device=i.device)
        x0s, epss = zip(*(pair for pair in self.predictions if pair is not None), strict=True)
        return torch.stack(self.states)[i, rows], torch.stack(x0s)[i - 1, rows], torch.stack(epss)[i - 1, rows]


@torch.no_grad()
def rollout(student: Denoise, schedule: NoiseSchedule, noise: torch.Tensor, text: Text, times: torch.Tensor) -> Trajectory:
    """The student's deterministic trajectory down a grid, by the first-order ODE step, without guidance.

    noise: float32 [B, C, h, w] ~ N(0, 1); times: the grid, float [K + 1], rising from 0 (schedule.grid).
    """
    nfe, batch = len(times) - 1, noise.shape[0]
    count = torch.full((batch,), nfe, device=noise.device)
    states = [noise] * (nfe + 1)
    predictions: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * (nfe + 1)
    for i in range(nfe, 0, -1):
        x0, eps = predictions[i] = student(states[i], times[i].expand(batch), text, count)
        states[i - 1] = schedule.add_noise(x0, eps, times[i - 1].expand(batch))
    return Trajectory(states, predictions)


def guided(teacher: Denoise, empty: Text, guidance: float, guidance_until: float = math.inf) -> Denoise:
    """The teacher with classifier-free guidance, D_u + w * (D_c - D_u), both halves in one batch, to be called as a teacher.

    w is `guidance` at timesteps up to `guidance_until`, and 1 above (a limited interval: Kynkäänniemi et al., arXiv
    2404.07724). `empty` has one row per sample.
    """

    def predict(
        x_t: torch.Tensor, t: torch.Tensor, text: Text, _: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x0s, epss = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), Text.concatenate(text, empty), None)
        (x0, empty_x0), (eps, empty_eps) = x0s.chunk(2), epss.chunk(2)
        pushed_x0, pushed_eps = empty_x0 + guidance * (x0 - empty_x0), empty_eps + guidance * (eps - empty_eps)
        holds = expand(t <= guidance_until, x0)
        return torch.where(holds, pushed_x0, x0), torch.where(holds, pushed_eps, eps)

    return predict


@torch.no_grad()
def guided_x0(
    teacher: Denoise,
    x_t: torch.Tensor,
    t: torch.Tensor,
    text: Text,
    empty: Text,
    guidance: float,
    guidance_until: float = math.inf,
) -> torch.Tensor:
    """x0 of the guided teacher. `empty` has one row per sample."""
    return guided(teacher, empty, guidance, guidance_until)(x_t, t, text, None)[0]

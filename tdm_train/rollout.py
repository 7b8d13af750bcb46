"""The student's trajectory, and the point on it that both updates look at. Equations: TDM, arXiv 2503.06674, section 3."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from tdm_train.denoiser import Text
from tdm_train.schedule import NoiseSchedule, expand, grid

Denoise = Callable[[torch.Tensor, torch.Tensor, Text, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
Interval = Literal["separate", "to_terminal"]


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
def rollout(student: Denoise, schedule: NoiseSchedule, noise: torch.Tensor, text: Text, nfe: int) -> Trajectory:
    """The student's deterministic trajectory for one K, by the first-order ODE step, without guidance.

    noise: float32 [B, C, h, w] ~ N(0, 1).
    """
    times, batch = grid(nfe), noise.shape[0]
    count = torch.full((batch,), nfe, device=noise.device)
    states = [noise] * (nfe + 1)
    predictions: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * (nfe + 1)
    for i in range(nfe, 0, -1):
        x0, eps = predictions[i] = student(states[i], noise.new_full((batch,), times[i]), text, count)
        states[i - 1] = schedule.add_noise(x0, eps, noise.new_full((batch,), times[i - 1]))
    return Trajectory(states, predictions)


@dataclass(frozen=True)
class Query:
    """Where the scores are asked: x_tau == a(tau) * x0 + s(tau) * mix, with x0 the student's prediction.

    x0, x_tau, mix, e (the fresh noise within mix): float32 [B, C, h, w]; tau: [B]. x0 carries the student's gradient
    when its step was taken with gradients.
    """

    x0: torch.Tensor
    x_tau: torch.Tensor
    tau: torch.Tensor
    mix: torch.Tensor
    e: torch.Tensor


def draw_tau(interval: Interval, landing: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """tau [B] for steps from `start` to `landing` (timesteps [B]).

    `separate`: in [max(20, m), t - 10), disjoint across a trajectory's steps, so that one fake score is unambiguous
    (paper). `to_terminal`: in [m + 20, 989) (the public demo).
    """
    low, high = (landing.clamp(min=20), start - 10) if interval == "separate" else (landing + 20, torch.full_like(start, 989))
    return low + torch.rand_like(low) * (high - low)


def query(schedule: NoiseSchedule, x0: torch.Tensor, eps: torch.Tensor, landing: torch.Tensor, tau: torch.Tensor) -> Query:
    """Takes the student's step to `landing` and noises its end up to `tau` (both [B], landing < tau).

    Noising the trajectory's own state x_m, and not x0 afresh, is what makes this TDM and not DMD.
    """
    x_m = schedule.add_noise(x0, eps, landing)
    (a_m, s_m), (a_tau, s_tau) = schedule.a_s(landing), schedule.a_s(tau)
    ratio = a_tau / a_m
    beta = (s_tau.square() - (ratio * s_m).square()).clamp(min=0).sqrt()
    e = torch.randn_like(x0)
    x_tau = expand(ratio, x0) * x_m + expand(beta, x0) * e
    mix = (expand(ratio * s_m, x0) * eps + expand(beta, x0) * e) / expand(s_tau, x0)
    return Query(x0, x_tau, tau, mix, e)


@torch.no_grad()
def guided_x0(teacher: Denoise, x_t: torch.Tensor, t: torch.Tensor, text: Text, empty: Text, guidance: float) -> torch.Tensor:
    """x0 with classifier-free guidance, D_u + w * (D_c - D_u), both halves in one batch. `empty` has one row per sample."""
    both = Text.concatenate(text, empty)
    conditional, unconditional = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both, None)[0].chunk(2)
    return unconditional + guidance * (conditional - unconditional)

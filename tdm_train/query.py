"""The score query: the noised end of one step of the student, where teacher and fake score are asked.

Random numbers come in as arguments, so that everything here is a function of its arguments. Equations: TDM, arXiv 2503.06674.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from tdm_train.schedule import NoiseSchedule, expand, shifted

Interval = Literal["separate", "to_terminal"]
MIN_TAU = 20.0
LANDING_GAP = 20.0  # a random landing time stays this far below the step's start
START_GAP = 10.0  # and tau this far below the step's start, or the grid's
TERMINAL_GAP = 20.0  # and this far above its landing time, when it may go up to the grid's start
SMALLEST_VARIANCE = 1e-12  # beta^2 where rounding, or tau == m, leaves none: 1/beta stays finite


def draw_landing(landing: torch.Tensor, start: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Random landing time: m ~ U[g_{i-1}, t - 20) for steps from `start` (t) to `landing` (g_{i-1}), all [B].

    uniform: [B], in [0, 1).
    """
    return landing + uniform * (start - LANDING_GAP - landing)


def draw_tau(
    interval: Interval,
    landing: torch.Tensor,
    start: torch.Tensor,
    terminal: float | torch.Tensor,
    uniform: torch.Tensor,
    shift: float = 1.0,
) -> torch.Tensor:
    """tau [B] for steps from `start` (t) to `landing` (m), timesteps [B], of a grid that starts at `terminal` (T).

    `separate`: in [max(20, m), t - 10), disjoint across a trajectory's steps, so that one fake score is unambiguous
    (paper). `to_terminal`: in [m + 20, T - 10) (the public demo); T - 10 itself for a random m above T - 30.
    uniform: [B], in [0, 1). shift: above 1, taus are drawn nearer to the interval's upper end.
    """
    if interval == "separate":
        low, high = landing.clamp(min=MIN_TAU), start - START_GAP
    else:
        high = torch.zeros_like(start) + terminal - START_GAP
        low = torch.minimum(landing + TERMINAL_GAP, high)
    return low + shifted(uniform, shift) * (high - low)


@dataclass(frozen=True)
class Query:
    """x_tau == a(tau) * x0 + s(tau) * mix == ratio * x_m + beta * e, with x0 the student's prediction.

    x0, x_m (the end of the student's step), x_tau, mix, e (the fresh noise within mix): float32 [B, C, h, w], or float64.
    landing (m), tau, ratio, beta: [B]. x0 carries the student's gradient when its step was taken with gradients.
    """

    x0: torch.Tensor
    x_m: torch.Tensor
    x_tau: torch.Tensor
    mix: torch.Tensor
    e: torch.Tensor
    landing: torch.Tensor
    tau: torch.Tensor
    ratio: torch.Tensor
    beta: torch.Tensor


def query(
    schedule: NoiseSchedule, x0: torch.Tensor, eps: torch.Tensor, landing: torch.Tensor, tau: torch.Tensor, e: torch.Tensor
) -> Query:
    """Takes the student's step to `landing` and noises its end up to `tau` (both [B], landing <= tau) with `e` ~ N(0, 1).

    x_m = a(m)*x0 + s(m)*eps;  r = a(tau)/a(m);  beta = sqrt(s(tau)^2 - (r*s(m))^2);  x_tau = r*x_m + beta*e;
    mix = (r*s(m)*eps + beta*e) / s(tau). Noising the trajectory's own state x_m, and not x0 afresh, is what makes this TDM
    and not DMD.
    """
    x_m = schedule.add_noise(x0, eps, landing)
    (a_m, s_m), (a_tau, s_tau) = schedule.a_s(landing), schedule.a_s(tau)
    ratio = a_tau / a_m
    beta = (s_tau.square() - (ratio * s_m).square()).clamp(min=SMALLEST_VARIANCE).sqrt()
    x_tau = expand(ratio, x0) * x_m + expand(beta, x0) * e
    mix = (expand(ratio * s_m, x0) * eps + expand(beta, x0) * e) / expand(s_tau, x0)
    return Query(x0, x_m, x_tau, mix, e, landing, tau, ratio, beta)

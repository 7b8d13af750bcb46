"""The two losses of TDM as pure functions (arXiv 2503.06674, in the form of its public demo)."""

from typing import Literal

import torch

from tdm_train.rollout import Query
from tdm_train.schedule import NoiseSchedule, expand

HUBER_C = 1e-3


def importance_weight(query: Query, clip: float = 2.0) -> torch.Tensor:
    """w_b = exp(-mean mix^2 / 2) / exp(-mean e^2 / 2), clipped to [1/clip, clip]: [B]."""
    exponent = 0.5 * (query.e.square() - query.mix.square()).flatten(1).mean(1)
    return exponent.exp().clamp(1 / clip, clip).detach()


def fake_score_loss(fake_x0: torch.Tensor, query: Query, schedule: NoiseSchedule) -> torch.Tensor:
    """`x0_minsnr`: mean_b [min(SNR(tau), 5) * w_b * mean_d (fake_x0 - x0)^2].

    fake_x0: the fake score's prediction at (x_tau, tau), float32 [B, C, h, w]. The student gets no gradient.
    """
    a, s = schedule.a_s(query.tau)
    weight = (a / s).square().clamp(max=5) * importance_weight(query)
    return (weight * (fake_x0 - query.x0.detach()).square().flatten(1).mean(1)).mean()


def student_loss(
    query: Query, teacher_x0: torch.Tensor, fake_x0: torch.Tensor, rho: Literal["huber", "mse"] = "huber"
) -> torch.Tensor:
    """mean(rho(x0 - stopgrad(x0 + D_cfg - F)) / N), N = stopgrad(mean_d |x0 - D_cfg|) per sample.

    teacher_x0 is the guided teacher's D_cfg and fake_x0 the fake score's F, both at (x_tau, tau), float32 [B, C, h, w].
    The gradient reaches x0 alone and points along F - D_cfg: zero where teacher and fake score agree.
    """
    teacher_x0, fake_x0 = teacher_x0.detach(), fake_x0.detach()
    x0 = query.x0
    error = (x0 - x0.detach()) + (fake_x0 - teacher_x0)  # = x0 - stopgrad(x0 + D_cfg - F), without its rounding
    normaliser = (x0 - teacher_x0).abs().flatten(1).mean(1).detach().clamp(min=1e-4)
    distance = (error.square() + HUBER_C**2).sqrt() - HUBER_C if rho == "huber" else error.square()
    return (distance / expand(normaliser, x0)).mean()

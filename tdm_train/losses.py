"""The losses of TDM, every variant a pure function. Equations: arXiv 2503.06674, and the forms of its public code."""

from typing import Literal

import torch

from tdm_train.query import Query
from tdm_train.schedule import NoiseSchedule, expand
from tdm_train.targets import Target

FakeLoss = Literal["x0_minsnr", "velocity"]
Rho = Literal["huber_elementwise", "huber_vector", "mse"]
Prediction = tuple[torch.Tensor, torch.Tensor]  # a denoiser's (x0, eps), float32 [B, C, h, w], or float64

HUBER_ELEMENTWISE_C = 1e-3
HUBER_VECTOR_C = 0.00054  # times sqrt(d)
SMALLEST_NORMALISER = 1e-4


def importance_weight(query: Query, clip: float) -> torch.Tensor:
    """w_b = exp(-mean_d mix^2 / 2) / exp(-mean_d e^2 / 2), clipped to [1/clip, clip]: [B], nearly 1; a clip of 1 is without."""
    exponent = 0.5 * (query.e.square() - query.mix.square()).flatten(1).mean(1)
    return exponent.exp().clamp(1 / clip, clip).detach()


def x0_minsnr_loss(
    fake: Prediction, target: Target, tau: torch.Tensor, schedule: NoiseSchedule, weight: torch.Tensor
) -> torch.Tensor:
    """mean_b[min(SNR(tau), 5) * w_b * mean_d (fake_x0 - x0*)^2] (the public demo). weight: w_b times the target's, [B]."""
    a, s = schedule.a_s(tau)
    return ((a / s).square().clamp(max=5) * weight * mean_square(fake[0] - target.x0)).mean()


def velocity_loss(
    fake: Prediction, target: Target, tau: torch.Tensor, schedule: NoiseSchedule, weight: torch.Tensor
) -> torch.Tensor:
    """mean_b[w_b * mean_d (fake_v - v*)^2] (the authors' flow-matching code). weight: w_b times the target's, [B].

    v is the family's velocity: eps - x0 under flow_prediction (v* = (x_tau - x0)/sigma for `x0_student`), else a*eps - s*x0.
    """
    error = schedule.velocity(*fake, tau) - schedule.velocity(target.x0, target.eps, tau)
    return (weight * mean_square(error)).mean()


def teacher_regulariser(
    fake: Prediction, teacher: Prediction, tau: torch.Tensor, schedule: NoiseSchedule, weight: float = 0.02
) -> torch.Tensor:
    """weight * mean (fake_v - teacher_v)^2, added to `velocity_loss`; the teacher with its prompt, without guidance."""
    error = schedule.velocity(*fake, tau) - schedule.velocity(*teacher, tau).detach()
    return weight * mean_square(error).mean()


def student_loss(query: Query, teacher_x0: torch.Tensor, fake_x0: torch.Tensor, rho: Rho) -> torch.Tensor:
    """mean(rho(x0 - stopgrad(x0 + D_cfg - F)) / N), N = stopgrad(mean_d |x0 - D_cfg|) per sample (no N in huber_vector).

    teacher_x0 is the guided teacher's D_cfg and fake_x0 the fake score's F, both at (x_tau, tau), float32 [B, C, h, w].
    The gradient reaches x0 alone and points along F - D_cfg: zero where teacher and fake score agree.
    """
    x0, teacher_x0 = query.x0, teacher_x0.detach()
    error = (x0 - x0.detach()) + (fake_x0.detach() - teacher_x0)  # = x0 - stopgrad(x0 + D_cfg - F), without its rounding
    return distance(error, x0.detach() - teacher_x0, rho)


def warm_up_loss(x0: torch.Tensor, teacher_x0: torch.Tensor, rho: Rho) -> torch.Tensor:
    """mean(rho(x0 - D_cfg) / N): regresses the student's x0 onto the guided teacher's at the same (x_t, t) of a rollout."""
    error = x0 - teacher_x0.detach()
    return distance(error, error.detach(), rho)


def distance(error: torch.Tensor, normalised_by: torch.Tensor, rho: Rho) -> torch.Tensor:
    """The mean of rho(error), over N = mean_d |normalised_by| per sample; both [B, C, h, w], of d elements per sample.

    `huber_elementwise`: sqrt(e^2 + c^2) - c with c = 1e-3 for every element (public demo). `mse`: e^2. `huber_vector`:
    sqrt(||e||^2 + c^2) - c with c = 0.00054*sqrt(d) per sample, without N (paper).
    """
    if rho == "huber_vector":
        c = HUBER_VECTOR_C * error[0].numel() ** 0.5
        return ((error.square().flatten(1).sum(1) + c**2).sqrt() - c).mean()
    n = normalised_by.abs().flatten(1).mean(1).clamp(min=SMALLEST_NORMALISER)
    c = HUBER_ELEMENTWISE_C
    values = (error.square() + c**2).sqrt() - c if rho == "huber_elementwise" else error.square()
    return (values / expand(n, error)).mean()


def mean_square(error: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> [B]."""
    return error.square().flatten(1).mean(1)

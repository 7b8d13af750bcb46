"""What the fake score is taught at x_tau, as a pair (x0, eps) that makes up x_tau, so that it can be read in every form."""

from dataclasses import dataclass
from typing import Literal

import torch

from tdm_train.query import Query
from tdm_train.schedule import NoiseSchedule, expand

FakeTarget = Literal["x0_student", "subinterval_dsm"]


@dataclass(frozen=True)
class Target:
    """x_tau == a(tau)*x0 + s(tau)*eps; `weight` [B] belongs on the squared error. No gradients; shapes as in Query."""

    x0: torch.Tensor
    eps: torch.Tensor
    weight: torch.Tensor


def fake_target(kind: FakeTarget, query: Query, schedule: NoiseSchedule) -> Target:
    """The target by its name."""
    return x0_student(query) if kind == "x0_student" else subinterval_dsm(query, schedule)


@torch.no_grad()
def x0_student(query: Query) -> Target:
    """x0* = x0, eps* = mix: the student's own prediction (all public code).

    Biased between a trajectory's ends: mix holds the student's eps, which is no fresh noise.
    """
    return Target(query.x0.detach(), query.mix.detach(), torch.ones_like(query.tau))


@torch.no_grad()
def subinterval_dsm(query: Query, schedule: NoiseSchedule) -> Target:
    """Denoising score matching of q(x_tau | x_m), whose score is -e/beta: exact at every boundary of the trajectory.

    eps* = s(tau)*e/beta;  x0* = (x_tau - s(tau)^2*e/beta) / a(tau), here as (x_m - r*s(m)^2*e/beta) / a(m), which does not
    divide by a(tau). As a flow velocity v* = eps* - x0* = -x_m/(1-m) + (e/beta)*(tau + r*m^2/(1-m)) (m, tau in 0 .. 1).
    Its variance explodes as tau -> m, so its squared error is weighted by beta^2/s(tau)^2. At m = 0 it is `x0_student`.
    Denoising score matching: Vincent, "A Connection Between Score Matching and Denoising Autoencoders", 2011.
    """
    (a_m, s_m), (_, s_tau) = schedule.a_s(query.landing), schedule.a_s(query.tau)
    e_over_beta = query.e / expand(query.beta, query.e)
    x0 = (query.x_m - expand(query.ratio * s_m.square(), query.e) * e_over_beta) / expand(a_m, query.e)
    return Target(x0, expand(s_tau, query.e) * e_over_beta, (query.beta / s_tau).square())

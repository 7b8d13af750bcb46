"""The objective against its equations, written out a second time: one sample after the other, in float64."""

import math
from dataclasses import dataclass
from typing import get_args

import pytest
import torch

from tdm_train.denoiser import Text
from tdm_train.losses import (
    FakeLoss,
    Rho,
    importance_weight,
    student_loss,
    teacher_regulariser,
    velocity_loss,
    warm_up_loss,
    x0_minsnr_loss,
)
from tdm_train.query import Interval, Query, draw_landing, draw_tau, query
from tdm_train.rollout import guided_x0
from tdm_train.schedule import NoiseSchedule, PredictionType
from tdm_train.targets import FakeTarget, fake_target, subinterval_dsm

Tensor = torch.Tensor
ABAR = torch.linspace(0.9999**0.5, 0.0047**0.5, 1000, dtype=torch.float64).square()
KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "flow_prediction")
GRID = (0, 224, 449, 674, 899)
STEPS = (1, 1, 2, 3, 4, 4)
GUIDANCE, CLIP, TEACHER_WEIGHT = 3.5, 1.05, 0.02
each_kind = pytest.mark.parametrize("kind", KINDS)
each_interval = pytest.mark.parametrize("interval", get_args(Interval))
each_landing = pytest.mark.parametrize("random_landing", [False, True], ids=["grid", "randmid"])


def agree(ours: Tensor, equations: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, equations, rtol=1e-9, atol=1e-9)


@dataclass
class Case:
    """What the networks put out and what is drawn at random, for a batch of one step each: float64 [B, 2, 3, 3] and [B]."""

    kind: PredictionType
    interval: Interval
    random_landing: bool

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        size = (len(STEPS), 2, 3, 3)
        self.x_t, self.e, self.student, self.fake, self.conditional, self.unconditional = (
            torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(6)
        )
        for leaf in (self.student, self.fake):
            leaf.requires_grad_(True)
        self.u_landing, self.u_tau = torch.rand(2, len(STEPS), generator=generator, dtype=torch.float64)

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule(self.kind, None if self.kind == "flow_prediction" else ABAR)

    @property
    def start(self) -> Tensor:
        return torch.tensor(GRID, dtype=torch.float64)[list(STEPS)]

    def asked(self) -> Query:
        """The query as the trainer makes it."""
        schedule, landing = self.schedule, torch.tensor(GRID, dtype=torch.float64)[[i - 1 for i in STEPS]]
        x0, eps = schedule.x0_eps(self.x_t, self.student, self.start)
        if self.random_landing:
            landing = draw_landing(landing, self.start, self.u_landing)
        tau = draw_tau(self.interval, landing, self.start, GRID[-1], self.u_tau)
        return query(schedule, x0, eps, landing, tau, self.e)

    def read(self, output: Tensor, asked: Query) -> tuple[Tensor, Tensor]:
        return self.schedule.x0_eps(asked.x_tau.detach(), output, asked.tau)


# The equations, for one sample.


def a_s(kind: str, t: float) -> tuple[float, float]:
    if kind == "flow_prediction":
        return 1 - t / 1000, t / 1000
    abar = float(ABAR[int(t)]) if t > 0 else 1.0
    return math.sqrt(abar), math.sqrt(1 - abar)


def read(kind: str, x: Tensor, output: Tensor, t: float) -> tuple[Tensor, Tensor]:
    a, s = a_s(kind, t)
    if kind == "epsilon":
        return (x - s * output) / a, output
    if kind == "v_prediction":
        return a * x - s * output, s * x + a * output
    return x - t / 1000 * output, x + (1 - t / 1000) * output


@dataclass
class Sample:
    """Section 3 for sample b of a case."""

    case: Case
    b: int

    def __post_init__(self) -> None:
        case, b, kind = self.case, self.b, self.case.kind
        t, m = GRID[STEPS[b]], GRID[STEPS[b] - 1]
        if case.random_landing:
            m = m + float(case.u_landing[b]) * (t - 20 - m)
        low, high = (max(20, m), t - 10) if case.interval == "separate" else (min(m + 20, 899 - 10), 899 - 10)
        tau = low + float(case.u_tau[b]) * (high - low)
        self.t, self.m, self.tau = t, m, tau
        self.x0, self.eps = read(kind, case.x_t[b], case.student[b], t)
        (self.a_m, self.s_m), (self.a, self.s) = a_s(kind, m), a_s(kind, tau)
        self.x_m = self.a_m * self.x0 + self.s_m * self.eps
        self.r = self.a / self.a_m
        self.beta = math.sqrt(self.s**2 - (self.r * self.s_m) ** 2)
        self.x_tau = self.r * self.x_m + self.beta * case.e[b]
        self.mix = (self.r * self.s_m * self.eps + self.beta * case.e[b]) / self.s

    def at_tau(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        return read(self.case.kind, self.x_tau.detach(), outputs[self.b], self.tau)

    def velocity_of(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps - x0 if self.case.kind == "flow_prediction" else self.a * eps - self.s * x0

    def importance(self) -> float:
        e = self.case.e[self.b]
        w = math.exp(-float((self.mix.detach() ** 2).mean()) / 2) / math.exp(-float((e**2).mean()) / 2)
        return min(max(w, 1 / CLIP), CLIP)

    def star(self, target: FakeTarget) -> tuple[Tensor, Tensor, float]:
        """(x0*, v*, weight) of section 4."""
        x0, x_m, x_tau, e = (value.detach() for value in (self.x0, self.x_m, self.x_tau, self.case.e[self.b]))
        if target == "x0_student":
            v = (x_tau - x0) / self.s if self.case.kind == "flow_prediction" else self.velocity_of(x0, self.mix.detach())
            return x0, v, 1.0
        x0 = (x_tau - self.s**2 * e / self.beta) / self.a
        if self.case.kind == "flow_prediction":
            m, tau = self.m / 1000, self.tau / 1000
            v = -x_m / (1 - m) + (e / self.beta) * (tau + self.r * m**2 / (1 - m))
        else:
            v = self.a * (self.s * e / self.beta) - self.s * x0
        return x0, v, self.beta**2 / self.s**2

    def fake_loss(self, loss: FakeLoss, target: FakeTarget) -> Tensor:
        x0, v, weight = self.star(target)
        fake_x0, fake_eps = self.at_tau(self.case.fake)
        if loss == "x0_minsnr":
            return min(self.a**2 / self.s**2, 5) * self.importance() * weight * ((fake_x0 - x0) ** 2).mean()
        fake_v = self.velocity_of(fake_x0, fake_eps)
        teacher_v = self.velocity_of(*self.at_tau(self.case.conditional))
        return self.importance() * weight * ((fake_v - v) ** 2).mean() + TEACHER_WEIGHT * ((fake_v - teacher_v) ** 2).mean()

    def student_loss(self, rho: Rho) -> Tensor:
        conditional, unconditional = self.at_tau(self.case.conditional)[0], self.at_tau(self.case.unconditional)[0]
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        target = (self.x0 + guided - self.at_tau(self.case.fake)[0]).detach()
        return written_rho(self.x0 - target, (self.x0 - guided).abs().mean().detach(), rho)

    def warm_up_loss(self, rho: Rho) -> Tensor:
        conditional, unconditional = (
            read(self.case.kind, self.case.x_t[self.b], outputs[self.b], self.t)[0]
            for outputs in (self.case.conditional, self.case.unconditional)
        )
        error = self.x0 - (unconditional + GUIDANCE * (conditional - unconditional))
        return written_rho(error, error.abs().mean().detach(), rho)


def written_rho(error: Tensor, n: Tensor, rho: Rho) -> Tensor:
    if rho == "huber_vector":
        c = 0.00054 * math.sqrt(error.numel())
        return torch.sqrt((error**2).sum() + c**2) - c
    if rho == "huber_elementwise":
        return ((torch.sqrt(error**2 + 1e-6) - 1e-3) / n).mean()
    return (error**2 / n).mean()


def samples(case: Case) -> list[Sample]:
    return [Sample(case, b) for b in range(len(STEPS))]


def mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


def guided(case: Case, x: Tensor, t: Tensor) -> Tensor:
    """guided_x0 with networks that put out what the case says."""
    nothing = Text(torch.zeros(len(STEPS), 1, 1), torch.ones(len(STEPS), 1, dtype=torch.int64))
    outputs = torch.cat([case.conditional, case.unconditional])
    return guided_x0(lambda x, t, text, nfe: case.schedule.x0_eps(x, outputs, t), x, t, nothing, nothing, GUIDANCE)


# Ours against them.


@each_kind
@each_interval
@each_landing
def test_the_query_is_that_of_the_equations(kind: PredictionType, interval: Interval, random_landing: bool) -> None:
    case = Case(kind, interval, random_landing)
    asked, written = case.asked(), samples(case)
    for name in ("x0", "x_m", "x_tau", "mix"):
        agree(getattr(asked, name), torch.stack([getattr(sample, name) for sample in written]))
    agree(asked.tau, torch.tensor([sample.tau for sample in written], dtype=torch.float64))
    agree(asked.beta, torch.tensor([sample.beta for sample in written], dtype=torch.float64))


@each_kind
@each_interval
@each_landing
@pytest.mark.parametrize("loss", get_args(FakeLoss))
@pytest.mark.parametrize("target", get_args(FakeTarget))
def test_the_fake_scores_loss_and_gradient_are_those_of_the_equations(
    kind: PredictionType, interval: Interval, random_landing: bool, loss: FakeLoss, target: FakeTarget
) -> None:
    case = Case(kind, interval, random_landing)
    asked = case.asked()
    fake, star = case.read(case.fake, asked), fake_target(target, asked, case.schedule)
    weight = importance_weight(asked, CLIP) * star.weight
    if loss == "x0_minsnr":
        ours = x0_minsnr_loss(fake, star, asked.tau, case.schedule, weight)
    else:
        teacher = case.read(case.conditional, asked)
        ours = velocity_loss(fake, star, asked.tau, case.schedule, weight)
        ours = ours + teacher_regulariser(fake, teacher, asked.tau, case.schedule, TEACHER_WEIGHT)
    written = mean([sample.fake_loss(loss, target) for sample in samples(case)])
    agree(ours, written)
    agree(torch.autograd.grad(ours, case.fake)[0], torch.autograd.grad(written, case.fake)[0])


@each_kind
@each_interval
@each_landing
@pytest.mark.parametrize("rho", get_args(Rho))
def test_the_students_loss_and_gradient_are_those_of_the_equations(
    kind: PredictionType, interval: Interval, random_landing: bool, rho: Rho
) -> None:
    case = Case(kind, interval, random_landing)
    asked = case.asked()
    teacher_x0 = guided(case, asked.x_tau.detach(), asked.tau)
    ours = student_loss(asked, teacher_x0, case.read(case.fake, asked)[0], rho)
    written = mean([sample.student_loss(rho) for sample in samples(case)])
    agree(ours, written)
    agree(torch.autograd.grad(ours, case.student)[0], torch.autograd.grad(written, case.student)[0])


@each_kind
@pytest.mark.parametrize("rho", get_args(Rho))
def test_the_warm_ups_loss_and_gradient_are_those_of_the_equations(kind: PredictionType, rho: Rho) -> None:
    case = Case(kind, "separate", False)
    ours = warm_up_loss(case.schedule.x0_eps(case.x_t, case.student, case.start)[0], guided(case, case.x_t, case.start), rho)
    written = mean([sample.warm_up_loss(rho) for sample in samples(case)])
    agree(ours, written)
    agree(torch.autograd.grad(ours, case.student)[0], torch.autograd.grad(written, case.student)[0])


@each_kind
@pytest.mark.parametrize("target", get_args(FakeTarget))
def test_every_form_of_a_target_makes_up_the_same_state(kind: PredictionType, target: FakeTarget) -> None:
    case = Case(kind, "separate", True)
    asked = case.asked()
    star = fake_target(target, asked, case.schedule)
    agree(case.schedule.add_noise(star.x0, star.eps, asked.tau), asked.x_tau.detach())


@each_kind
def test_both_targets_are_the_same_on_the_last_step(kind: PredictionType) -> None:
    asked = Case(kind, "separate", False).asked()
    exact, public = (fake_target(target, asked, Case(kind, "separate", False).schedule) for target in get_args(FakeTarget))
    last = asked.landing == 0
    agree(exact.x0[last], public.x0[last])
    agree(exact.eps[last], public.eps[last])
    assert not torch.allclose(exact.x0[~last], public.x0[~last])


@each_kind
def test_the_exact_target_is_finite_where_tau_is_the_landing_time(kind: PredictionType) -> None:
    case = Case(kind, "separate", False)
    landing = torch.full((len(STEPS),), 449.0)
    x0, eps, e = case.student.detach().float(), case.fake.detach().float(), case.e.float()
    asked = query(case.schedule, x0, eps, landing, landing, e)
    star = subinterval_dsm(asked, case.schedule)
    loss = x0_minsnr_loss((x0, eps), star, asked.tau, case.schedule, star.weight)
    assert loss.dtype == torch.float32
    assert 0 < float(loss) < 10


def test_the_importance_weight_is_one_for_equal_noise_and_is_clipped() -> None:
    schedule, x0 = NoiseSchedule("flow_prediction"), torch.zeros(2, 1, 4, 4)
    landing, tau = torch.zeros(2), torch.full((2,), 500.0)
    torch.testing.assert_close(importance_weight(query(schedule, x0, x0, landing, tau, 1 + x0), 2.0), torch.ones(2))
    noisy = query(schedule, x0, 9 + x0, landing + 400, tau, x0)
    assert importance_weight(noisy, 2.0).tolist() == [0.5, 0.5]
    assert importance_weight(noisy, 1.0).tolist() == [1, 1]

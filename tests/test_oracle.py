"""The whole method where every answer is known: data N(MEAN, SIGMA^2) in one dimension, linear networks, exact expectations.

What the student's four boundaries are distributed like at the fixed point of the objective is compared with what the data
are after the same noise. The student is linear, so that its states are Gaussian, and everything an update looks at has two
moments: the four sigma points of (the trajectory's noise, the fresh noise), all of them +1 or -1, give both exactly. They stand
along the dimension of the latents; along the batch stand the steps, each at NODES times tau. Runs in float64.
"""

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch

from tdm_train.denoiser import Text
from tdm_train.losses import FakeLoss, importance_weight, student_loss, teacher_regulariser, velocity_loss, x0_minsnr_loss
from tdm_train.query import Query, draw_tau, query
from tdm_train.rollout import Denoise, rollout, rollout_to
from tdm_train.schedule import NoiseSchedule, PredictionType, expand, grid
from tdm_train.targets import FakeTarget, fake_target

MEAN, SIGMA, K, NODES = 0.7, 0.5, 4, 16
ABAR = torch.linspace(0.9999**0.5, 0.0047**0.5, 1000, dtype=torch.float64).square()
KINDS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "flow_prediction")
NOISE, FRESH = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64)
NO_TEXT = Text(torch.empty(K * NODES, 0))
Pair = tuple[torch.Tensor, torch.Tensor]


class Oracle:
    """The TDM iteration with the fake score's minimiser in place of its update. `student` [K, 2]: slope and offset of the
    network's output at each step."""

    def __init__(self, kind: PredictionType, loss: FakeLoss, target: FakeTarget):
        self.schedule = NoiseSchedule(kind, None if kind == "flow_prediction" else ABAR)
        self.loss, self.target = loss, target
        self.times = torch.tensor(grid(K), dtype=torch.float64)
        self.i = torch.arange(1, K + 1).repeat_interleave(NODES)
        self.start, self.landing = self.times[self.i], self.times[self.i - 1]
        uniform = ((torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES).repeat(K)
        self.tau = draw_tau("separate", self.landing, self.start, self.times[-1], uniform)
        self.noise, self.fresh = NOISE.expand(K * NODES, -1), FRESH.expand(K * NODES, -1)

    def linear(self, x: torch.Tensor, t: torch.Tensor, coefficients: torch.Tensor) -> Pair:
        return self.schedule.x0_eps(x, coefficients[:, :1] * x + coefficients[:, 1:], t)

    def marginal(self, t: torch.Tensor) -> Pair:
        """Mean and variance of the data noised to t, both like t."""
        a, s = self.schedule.a_s(t)
        return a * MEAN, a.square() * SIGMA**2 + s.square()

    def teacher(self, x: torch.Tensor, t: torch.Tensor) -> Pair:
        """The exact denoiser: E[x0 | x] of a Gaussian, and the eps that goes with it."""
        (mean, variance), (a, s) = self.marginal(t), self.schedule.a_s(t)
        x0 = MEAN + expand(a * SIGMA**2 / variance, x) * (x - expand(mean, x))
        return x0, (x - expand(a, x) * x0) / expand(s, x)

    def teacher_coefficients(self) -> torch.Tensor:
        """The student that is the teacher at its own four times: [K, 2]."""
        t = self.times[1:]
        points = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(K, 2)
        outputs = self.schedule.network_target(*self.teacher(points, t), t)
        return torch.stack([outputs[:, 1] - outputs[:, 0], outputs[:, 0]], 1)

    def denoise(self, student: torch.Tensor) -> Denoise:
        steps = {float(t): row for t, row in zip(self.times[1:], student, strict=True)}
        return lambda x, t, text, nfe: self.linear(x, t, steps[float(t[0])].expand(len(t), 2))

    def fake_score(self, asked: Query) -> torch.Tensor:
        """The fake score's coefficients [K * NODES, 2], one linear network for every tau."""
        star, teacher = fake_target(self.target, asked, self.schedule), self.teacher(asked.x_tau, asked.tau)
        weight = importance_weight(asked, 2.0) * star.weight

        def loss(coefficients: torch.Tensor) -> torch.Tensor:
            fake = self.linear(asked.x_tau, asked.tau, coefficients)
            if self.loss == "x0_minsnr":
                return x0_minsnr_loss(fake, star, asked.tau, self.schedule, weight)
            regulariser = teacher_regulariser(fake, teacher, asked.tau, self.schedule)
            return velocity_loss(fake, star, asked.tau, self.schedule, weight) + regulariser

        return minimiser(loss, torch.zeros(len(self.i), 2, dtype=torch.float64))

    def iterate(self, student: torch.Tensor) -> torch.Tensor:
        """One iteration: the fake score's exact minimiser, then the student's for the target that this gives."""
        x_t, x0, eps = rollout_to(self.denoise(student), self.schedule, self.noise, NO_TEXT, self.times, self.i)
        asked = query(self.schedule, x0, eps, self.landing, self.tau, self.fresh)
        fake_x0, _ = self.linear(asked.x_tau, self.tau, self.fake_score(asked))
        teacher_x0, _ = self.teacher(asked.x_tau, self.tau)

        def loss(moved: torch.Tensor) -> torch.Tensor:
            x0, eps = self.linear(x_t, self.start, moved[self.i - 1])
            asked = query(self.schedule, x0, eps, self.landing, self.tau, self.fresh)
            return student_loss(asked, teacher_x0, fake_x0, "mse")

        return minimiser(loss, student)

    def boundaries(self) -> tuple[np.ndarray, np.ndarray]:
        """At the fixed point, for i = K-1 .. 0: error of the mean, in SIGMA, and variance over the data's variance."""
        student = self.teacher_coefficients()
        for _ in range(300):
            before, student = student, self.iterate(student)
            if float((student - before).abs().max()) < 1e-5:
                break
        else:
            pytest.fail(f"no fixed point was reached: {student}")
        trajectory = rollout(self.denoise(student), self.schedule, self.noise[:1], NO_TEXT, self.times)
        states = torch.cat(trajectory.states[K - 1 :: -1])
        mean, variance = self.marginal(self.times[:-1].flip(0))
        spread = states.var(1, correction=0)
        return ((states.mean(1) - mean) / SIGMA).numpy(), (spread / variance).numpy()


def minimiser(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """The minimiser of a quadratic in `at` [n, 2] whose rows do not interact: the one Newton step that finds it."""
    at = at.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(at), at, create_graph=True)
    rows = [torch.autograd.grad(gradient[:, k].sum(), at, retain_graph=True)[0] for k in (0, 1)]
    return (at - torch.linalg.solve(torch.stack(rows, 1), gradient)).detach()


each_kind = pytest.mark.parametrize("kind", KINDS)
each_loss = pytest.mark.parametrize("loss", get_args(FakeLoss))


@each_kind
@each_loss
def test_the_exact_target_recovers_every_boundary(kind: PredictionType, loss: FakeLoss) -> None:
    mean_error, variance = Oracle(kind, loss, "subinterval_dsm").boundaries()
    assert variance == pytest.approx([1, 1, 1, 1], rel=0.01)
    assert mean_error == pytest.approx([0, 0, 0, 0], abs=0.01)


@each_kind
@each_loss
def test_the_public_target_recovers_the_last_boundary_and_is_too_wide_between(kind: PredictionType, loss: FakeLoss) -> None:
    mean_error, variance = Oracle(kind, loss, "x0_student").boundaries()
    assert variance[-1] == pytest.approx(1, rel=0.01)
    assert mean_error[-1] == pytest.approx(0, abs=0.01)
    assert min(variance[:-1]) > 1.01
    assert max(variance[:-1]) < 1.38

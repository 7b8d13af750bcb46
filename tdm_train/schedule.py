"""Noise schedules as data: x_t = a(t) * x0 + s(t) * eps, and what a network's output means under each.

Timesteps run from 0 (clean) to 1000 (noise) for every family; coefficients are float32 whatever the network's dtype.
"""

from dataclasses import dataclass
from typing import Literal

import torch

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction"]
TRAIN_TIMESTEPS = 1000


def expand(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...] with as many dimensions as `like`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


@dataclass(frozen=True)
class NoiseSchedule:
    """a(t) and s(t) of one family.

    flow_prediction: a = 1 - t/1000, s = t/1000 (rectified flow). epsilon and v_prediction: a = sqrt(abar_t),
    s = sqrt(1 - abar_t) with `alphas_cumprod` float32 [1000]; t is then rounded to its integer index.
    """

    prediction_type: PredictionType
    alphas_cumprod: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.alphas_cumprod is None) != (self.prediction_type == "flow_prediction"):
            raise ValueError(f"alphas_cumprod goes with epsilon and v_prediction only, not with {self.prediction_type!r}")

    def a_s(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps [B], 0 .. 1000 -> (a, s), each float32 [B]. t = 0 is clean: (1, 0)."""
        if self.alphas_cumprod is None:
            sigma = t.float() / TRAIN_TIMESTEPS
            return 1 - sigma, sigma
        abar = self.alphas_cumprod.to(t.device)[t.round().long().clamp(0, TRAIN_TIMESTEPS - 1)]
        abar = torch.where(t <= 0, torch.ones_like(abar), abar)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """a(t) * x0 + s(t) * eps for x0, eps [B, ...] and t [B]."""
        a, s = (expand(value, x0) for value in self.a_s(t))
        return a * x0 + s * eps

    def x0_eps(self, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's prediction at (x_t, t) -> (x0_hat, eps_hat), float32, with x_t == a*x0_hat + s*eps_hat."""
        a, s = (expand(value, x_t) for value in self.a_s(t))
        x_t, prediction = x_t.float(), prediction.float()
        match self.prediction_type:
            case "epsilon":
                return (x_t - s * prediction) / a, prediction
            case "v_prediction":
                return a * x_t - s * prediction, s * x_t + a * prediction
            case "flow_prediction":
                return x_t - s * prediction, x_t + a * prediction

    def network_target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should put out at x_t = a*x0 + s*eps: eps, v = a*eps - s*x0, or the flow eps - x0."""
        a, s = (expand(value, x0) for value in self.a_s(t))
        match self.prediction_type:
            case "epsilon":
                return eps
            case "v_prediction":
                return a * eps - s * x0
            case "flow_prediction":
                return eps - x0


def grid(nfe: int, last: float = 999.0) -> list[float]:
    """The student's timesteps for `nfe` evaluations, ascending from 0: g_i = T * i / K (paper), g_0 = 0."""
    return [last * i / nfe for i in range(nfe + 1)]

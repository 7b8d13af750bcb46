"""Noise schedules as data: x_t = a(t) * x0 + s(t) * eps, and what a network's output means under each.

Timesteps run from 0 (clean) to `train_timesteps` (noise); coefficients are float32 whatever the network's dtype (float64 for
float64 timesteps).
"""

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
TRAIN_TIMESTEPS = 1000  # of every published family


def expand(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...] with as many dimensions as `like`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def precise(values: torch.Tensor) -> torch.Tensor:
    """float64 as it is, everything else as float32."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class NoiseSchedule:
    """a(t) and s(t) of one family.

    flow_prediction (rectified flow): a = 1 - sigma, s = sigma with sigma = t / train_timesteps. The others: a = sqrt(abar_t),
    s = sqrt(1 - abar_t) with `alphas_cumprod` float [train_timesteps]; of t only the whole part counts, as only it is told to
    the networks.
    """

    prediction_type: PredictionType
    alphas_cumprod: torch.Tensor | None = None
    train_timesteps: int = TRAIN_TIMESTEPS

    def __post_init__(self) -> None:
        legal = get_args(PredictionType)
        if self.prediction_type not in legal:
            raise ValueError(f"prediction_type={self.prediction_type!r}, legal: {', '.join(map(repr, legal))}")
        if (self.alphas_cumprod is None) != (self.prediction_type == "flow_prediction"):
            raise ValueError(
                f"alphas_cumprod goes with every prediction_type but flow_prediction, not {self.prediction_type!r}"
            )
        if self.alphas_cumprod is not None and len(self.alphas_cumprod) != self.train_timesteps:
            raise ValueError(
                f"train_timesteps={self.train_timesteps}, legal: {len(self.alphas_cumprod)}, as alphas_cumprod has"
            )

    def a_s(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, s) [B] of the state at timesteps t [B], 0 .. train_timesteps: at 0 it is clean, (1, 0)."""
        a, s = self.evaluated_a_s(t)
        return torch.where(t <= 0, torch.ones_like(a), a), torch.where(t <= 0, torch.zeros_like(s), s)

    def evaluated_a_s(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, s) [B] by which a network's output at t [B] is read. They differ from `a_s` below timestep 1: a network that is
        evaluated at 0 was trained on the little noise of alphas_cumprod[0], while a step that lands on 0 leaves none."""
        if self.alphas_cumprod is None:
            sigma = precise(t) / self.train_timesteps
            return 1 - sigma, sigma
        abar = self.alphas_cumprod.to(t.device)[t.long().clamp(0, self.train_timesteps - 1)].to(precise(t).dtype)
        return abar.sqrt(), (1 - abar).sqrt()

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """a(t) * x0 + s(t) * eps for x0, eps [B, ...] and t [B]."""
        a, s = (expand(value, x0) for value in self.a_s(t))
        return a * x0 + s * eps

    def x0_eps(self, x_t: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's prediction at (x_t, t) -> (x0_hat, eps_hat), float32, with x_t == a*x0_hat + s*eps_hat.

        v_prediction is exact at a = 0 (zero terminal SNR); epsilon has no meaning there.
        """
        a, s = (expand(value, x_t) for value in self.evaluated_a_s(t))
        x_t, prediction = precise(x_t), precise(prediction)
        match self.prediction_type:
            case "epsilon":
                return (x_t - s * prediction) / a, prediction
            case "v_prediction":
                return a * x_t - s * prediction, s * x_t + a * prediction
            case "sample":
                return prediction, (x_t - a * prediction) / s
            case "flow_prediction":
                return x_t - s * prediction, x_t + a * prediction

    def network_target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should put out at x_t = a*x0 + s*eps: eps, v = a*eps - s*x0, x0, or the flow eps - x0."""
        match self.prediction_type:
            case "epsilon":
                return eps
            case "v_prediction" | "flow_prediction":
                return self.velocity(x0, eps, t)
            case "sample":
                return x0

    def velocity(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """v = eps - x0 under flow_prediction, else v = a*eps - s*x0 (Salimans and Ho, arXiv 2202.00512)."""
        if self.prediction_type == "flow_prediction":
            return eps - x0
        a, s = (expand(value, x0) for value in self.evaluated_a_s(t))
        return a * eps - s * x0


Place = TypeVar("Place", float, torch.Tensor)


def shifted(u: Place, shift: float) -> Place:
    """shift*u / (1 + (shift - 1)*u): places u, 0 .. 1, nearer to 1 for a shift above 1 (Esser et al., arXiv 2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def grid(nfe: int, last: float = 999.0) -> list[float]:
    """The student's timesteps for `nfe` evaluations, ascending from 0: g_i = T * i / K (paper), g_0 = 0."""
    return [last * i / nfe for i in range(nfe + 1)]

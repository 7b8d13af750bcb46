"""The student's trajectory, and the guided teacher. Equations: TDM, arXiv 2503.06674, section 3."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tdm_train.denoiser import Text
from tdm_train.schedule import NoiseSchedule

Denoise = Callable[[torch.Tensor, torch.Tensor, Text, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Trajectory:
    """K steps of the student. Lists are indexed by i: `states[K]` is the noise, `states[0]` the finished latents;
    `predictions[i]` is (x0, eps) at `states[i]` (None at i = 0). All tensors are float32 [B, C, h, w]."""

    states: list[torch.Tensor]
    predictions: list[tuple[torch.Tensor, torch.Tensor] | None]


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


@torch.no_grad()
def rollout_to(
    student: Denoise, schedule: NoiseSchedule, noise: torch.Tensor, text: Text, times: torch.Tensor, i: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_t, x0, eps): the state at each sample's own step i[b] (int64 [B], 1 .. K) of `rollout`, and what is predicted there.

    A sample is evaluated no further than there: (K + 1) / 2 times in the mean over i, not K.
    """
    nfe, x_t = len(times) - 1, noise.clone()
    x0, eps = torch.empty_like(x_t), torch.empty_like(x_t)
    for step in range(nfe, 0, -1):
        going = (i <= step).nonzero().flatten()
        asked = going if len(going) else i.new_zeros(1)  # never none: under FSDP all processes call the network together
        time, count = times[step].expand(len(asked)), torch.full_like(asked, nfe)
        predicted = student(x_t[asked], time, text.select(asked.to(text.emb.device)), count)
        if not len(going):
            continue
        x0[going], eps[going] = predicted
        onward = going[i[going] < step]
        x_t[onward] = schedule.add_noise(x0[onward], eps[onward], times[step - 1].expand(len(onward)))
    return x_t, x0, eps


def guided(teacher: Denoise, empty: Text, guidance: float, guidance_until: float = math.inf) -> Denoise:
    """The teacher with classifier-free guidance, D_u + w * (D_c - D_u), both in one batch, to be called as a teacher.

    w is `guidance` at timesteps up to `guidance_until`, and 1 above (a limited interval: Kynkäänniemi et al., arXiv
    2404.07724), where it is asked with its prompt alone. `empty` has one row per sample.
    """

    def predict(
        x_t: torch.Tensor, t: torch.Tensor, text: Text, _: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pushed = (t <= guidance_until).nonzero().flatten()
        both = Text.concatenate(text, empty.select(pushed))
        x0, eps = teacher(torch.cat([x_t, x_t[pushed]]), torch.cat([t, t[pushed]]), both, None)
        (x0, empty_x0), (eps, empty_eps) = (part.tensor_split([len(t)]) for part in (x0, eps))
        pushed_x0, pushed_eps = empty_x0 + guidance * (x0[pushed] - empty_x0), empty_eps + guidance * (eps[pushed] - empty_eps)
        return x0.index_copy(0, pushed, pushed_x0), eps.index_copy(0, pushed, pushed_eps)

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

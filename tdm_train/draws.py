"""What chance decides in an iteration, as a function of the seed, the iteration and the sample's place in its batch alone.

So a run goes on after a restart as if nothing had been, and a global batch is the same whether one process has all of it at
once, in several micro-batches, or several processes share it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Draws:
    """For B samples: row (of the prompts) and i (which step of the trajectory, 1 .. K), int64 [B]; noise (where trajectories
    start), fake_noise and student_noise (of the two score queries), float32 [B, ...] ~ N(0, 1); landing, fake_tau and
    student_tau, [B], uniform in [0, 1)."""

    row: torch.Tensor
    i: torch.Tensor
    noise: torch.Tensor
    fake_noise: torch.Tensor
    student_noise: torch.Tensor
    landing: torch.Tensor
    fake_tau: torch.Tensor
    student_tau: torch.Tensor


def draw_nfe(seed: int, step: int, legal: tuple[int, ...], shares: tuple[float, ...] = ()) -> int:
    """K of an iteration: one for all processes, so that they do the same work. shares: weights of `legal`, or none."""
    chances = np.asarray(shares) / sum(shares) if shares else None
    return int(np.random.Generator(np.random.Philox(key=[seed, step])).choice(legal, p=chances))


def draw(
    seed: int, step: int, samples: range, prompts: int, nfe: int, shape: tuple[int, ...], device: torch.device | str
) -> Draws:
    """The draws of the samples with these places in the global batch, on `device`. shape: of one sample's latents."""
    drawn = [_draw_sample(seed, step, sample, prompts, nfe, shape) for sample in samples]
    return Draws(**{name: torch.stack([one[name] for one in drawn]).to(device) for name in drawn[0]})


def _draw_sample(seed: int, step: int, sample: int, prompts: int, nfe: int, shape: tuple[int, ...]) -> dict[str, Any]:
    key = np.random.SeedSequence((seed, step, sample)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(key))
    whole = {
        "row": torch.randint(prompts, (), generator=generator),
        "i": torch.randint(1, nfe + 1, (), generator=generator),
    }
    normal = {name: torch.randn(shape, generator=generator) for name in ("noise", "fake_noise", "student_noise")}
    uniform = {name: torch.rand((), generator=generator) for name in ("landing", "fake_tau", "student_tau")}
    return whole | normal | uniform

"""A diffusers scheduler -> the rows (timestep, c0, c1, c2) of each NFE.

Every deterministic solver served here is linear: next = c0 * latents + c1 * x0 + c2 * x0_prev. So its coefficients can be
read off the diffusers scheduler object itself, by stepping it on the three unit vectors, and no formula is written twice.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from export.linear_samplers import is_flow, prediction_type, refuse_unsuitable

Row = tuple[float, float, float, float]
# In float64, so that turning x0 into a prediction and back adds no rounding to the scheduler's own.
LATENTS, X0, X0_PREV = torch.eye(3, dtype=torch.float64).unbind()
SMALLEST_ABAR = 2**-24  # what DPMSolverMultistepScheduler has in place of a zero terminal signal-to-noise ratio


def sampler_table(
    scheduler: Any, nfe: int, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
) -> list[Row]:
    """The `nfe` rows (timestep, c0, c1, c2) of a scheduler, in execution order, from its configuration alone.

    Without `timesteps` and `sigmas` the grid is what the scheduler's own set_timesteps(nfe) makes. An explicit grid falls
    strictly and holds `nfe` values; each step ends at the next value and the last where the scheduler's own last step ends:
    - DPMSolverMultistepScheduler, `timesteps`: by its own set_timesteps. Flow sigmas: `timesteps` or `sigmas`, which it has
      no argument for, take the place of its sigmas; flow_shift does not act on them.
    - FlowMatchEulerDiscreteScheduler, `sigmas` (which it shifts) or `timesteps` (only unshifted): by its own set_timesteps.
    - DDIM and both CogVideoX schedulers, `timesteps`: their step always goes down by num_train_timesteps // nfe, so that
      distance is set to each gap of the grid.

    The scheduler is not changed. Raises ValueError for one that is not linear, not deterministic, or not exact at its
    timesteps, and for a grid that it has no meaning for.
    """
    started, strides = start(scheduler, nfe, timesteps, sigmas)
    rows = [_row(started, index, strides) for index in range(nfe)]
    if not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError(f"{type(scheduler).__name__}: nfe={nfe} gives coefficients that are not finite: {rows}")
    return rows


def start(
    scheduler: Any, nfe: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> tuple[Any, list[int] | None]:
    """A fresh scheduler with its `nfe` steps set, and how far each goes down where that must be told (see take_stride)."""
    refuse_unsuitable(scheduler, nfe)
    started = type(scheduler).from_config(scheduler.config)
    if timesteps is None and sigmas is None:
        started.set_timesteps(nfe)
    else:
        _refuse_grid(started, nfe, timesteps, sigmas)
        _place_grid(started, timesteps, sigmas)
    _refuse_steps(started, nfe)
    return started, _strides(started) if timesteps is not None and not hasattr(started, "sigmas") else None


def take_stride(started: Any, stride: int) -> None:
    """Makes a scheduler's next step go down by `stride`; it always takes num_train_timesteps // num_inference_steps."""
    started.register_to_config(num_train_timesteps=stride)
    started.num_inference_steps = 1


def told_timestep(scheduler: Any, timestep: float) -> float:
    """What the network is told at a row's timestep: all of it by the flow-match sampler, the whole part by every other."""
    return timestep if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else float(math.floor(timestep))


def _refuse_grid(started: Any, nfe: int, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> None:
    """Raises ValueError for an explicit grid that does not fit the scheduler; _refuse_steps checks the steps it makes."""
    name, grid = type(started).__name__, timesteps if timesteps is not None else sigmas
    if timesteps is not None and sigmas is not None:
        raise ValueError(f"timesteps={list(timesteps)} and sigmas={list(sigmas)}: give one of them")
    if sigmas is not None and not is_flow(started):
        raise ValueError(f"{name}: sigmas={list(sigmas)}, legal: timesteps (only flow predictions are told by sigmas)")
    assert grid is not None
    field, top = ("timesteps", started.config.num_train_timesteps) if sigmas is None else ("sigmas", 1)
    low, high = (0, top) if is_flow(started) else (-1, top - 1)
    if len(grid) != nfe or not all(low < value <= high for value in grid):
        raise ValueError(f"{name}: {field}={list(grid)}, legal: nfe={nfe} values above {low} and up to {high}")
    if not is_flow(started) and any(value != int(value) for value in grid):
        raise ValueError(f"{name}: timesteps={list(grid)}, legal: whole numbers (alphas_cumprod has no others)")
    if isinstance(started, FlowMatchEulerDiscreteScheduler):
        for kind in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if started.config[kind]:
                raise ValueError(f"{name}: {field}={list(grid)} with {kind}=True, legal: False (it would replace the grid)")


def _place_grid(started: Any, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None) -> None:
    """Puts an explicit grid that has passed _refuse_grid into the scheduler."""
    if isinstance(started, FlowMatchEulerDiscreteScheduler):
        started.set_timesteps(
            sigmas=None if sigmas is None else list(sigmas), timesteps=None if timesteps is None else list(timesteps)
        )
    elif isinstance(started, DPMSolverMultistepScheduler) and is_flow(started):
        train = started.config.num_train_timesteps
        values = torch.tensor(sigmas if sigmas is not None else [t / train for t in timesteps or ()], dtype=torch.float64)
        started.set_timesteps(len(values))
        started.sigmas = torch.cat([values.float(), started.sigmas[-1:]])
        # A timestep that was given whole must not lose one on its way through sigma.
        started.timesteps = (values * train + 1e-6).long()
    elif isinstance(started, DPMSolverMultistepScheduler):
        started.set_timesteps(timesteps=[int(t) for t in timesteps or ()])
    else:
        started.set_timesteps(len(timesteps or ()))
        started.timesteps = torch.tensor([int(t) for t in timesteps or ()])


def _refuse_steps(started: Any, nfe: int) -> None:
    """Raises ValueError where the scheduler's steps are not `nfe` falling timesteps that say what its coefficients are."""
    name, steps, kind = type(started).__name__, started.timesteps.tolist(), prediction_type(started)
    falling = all(later < earlier for earlier, later in itertools.pairwise(steps))
    train = started.config.num_train_timesteps
    if len(steps) != nfe or not falling or not all(0 <= t <= train for t in steps):
        raise ValueError(
            f"{name}: timesteps={steps}, legal: nfe={nfe} strictly falling values from 0 to {train}; "
            "change timestep_spacing, steps_offset or the shift, or give timesteps"
        )
    if isinstance(started, DPMSolverMultistepScheduler) and started.sigmas[-1] > started.sigmas[-2]:
        raise ValueError(
            f"{name}: sigmas={started.sigmas.tolist()}, legal: falling to the end; "
            f"final_sigmas_type={started.config.final_sigmas_type!r} ends above the last step: use 'zero' or a higher grid"
        )
    if isinstance(started, FlowMatchEulerDiscreteScheduler) and (
        (started.sigmas[:-1] * train - started.timesteps).abs().max() > 1e-3
    ):
        raise ValueError(
            f"{name}: timesteps={steps} with shift={started.config.shift} and shift_terminal={started.config.shift_terminal}, "
            "legal: no shift (diffusers shifts the sigmas but not the timesteps that the network is told); give sigmas"
        )
    if kind == "epsilon" and (abar := float(_a_s(started, 0)[0]) ** 2) <= SMALLEST_ABAR * (1 + 1e-5):
        raise ValueError(
            f"{name}: prediction_type='epsilon' at timestep {steps[0]}, where alphas_cumprod is {abar:.2g}: x0 = (x - s * eps) "
            f"/ a has no meaning there, legal: above {SMALLEST_ABAR:.2g}; use v_prediction or sample, or start the grid lower"
        )


def _strides(started: Any) -> list[int]:
    """How far each step of an explicit grid goes down; the last goes below 0, which means final_alpha_cumprod."""
    steps = [*started.timesteps.tolist(), -1]
    return [here - there for here, there in itertools.pairwise(steps)]


def _row(started: Any, index: int, strides: list[int] | None) -> Row:
    """Steps a copy up to `index` so that the latents, x0 and previous x0 of that step are unit vectors."""
    fresh = copy.deepcopy(started)
    zero = torch.zeros(3, dtype=torch.float64)
    for earlier in range(index):
        _step(fresh, earlier, zero, X0_PREV if earlier == index - 1 else zero, strides)
    c0, c1, c2 = _step(fresh, index, LATENTS, X0, strides).tolist()
    return _exact_timestep(fresh, index), c0, c1, c2


def _step(fresh: Any, index: int, latents: torch.Tensor, x0: torch.Tensor, strides: list[int] | None) -> torch.Tensor:
    """The scheduler's own step from `latents`, with the network output that it reads as `x0`."""
    prediction, timestep = _prediction(fresh, index, latents, x0), fresh.timesteps[index]
    if strides is not None:
        take_stride(fresh, strides[index])
    if isinstance(fresh, CogVideoXDPMScheduler):  # its noise is multiplied by zero, but would move torch's generator
        stepped: torch.Tensor = fresh.step(prediction, None, timestep, None, latents, generator=torch.Generator())[0]
    else:
        stepped = fresh.step(prediction, timestep, latents).prev_sample
    return stepped


def _exact_timestep(scheduler: Any, index: int) -> float:
    """The step's timestep. DPM samplers truncate it over flow sigmas to a whole number for the network but not in their
    coefficients, so it is given with its fraction, which the denoiser drops again where the network is told."""
    whole = float(scheduler.timesteps[index])
    if not (isinstance(scheduler, DPMSolverMultistepScheduler) and is_flow(scheduler)):
        return whole
    exact = float(scheduler.sigmas[index]) * scheduler.config.num_train_timesteps
    return float(round(min(max(exact, whole), whole + 0.9999), 4))


def _a_s(scheduler: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a and s of a step as the scheduler itself computes them, so that _prediction undoes exactly what it does."""
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        a, s = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
    elif isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        a, s = 1 - scheduler.sigmas[index], scheduler.sigmas[index]
    else:
        abar = scheduler.alphas_cumprod[scheduler.timesteps[index]]
        a, s = abar**0.5, (1 - abar) ** 0.5
    return a.double(), s.double()


def _prediction(scheduler: Any, index: int, latents: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """The network output that the scheduler will read as `x0` at step `index`. No division by a, which may be 0."""
    a, s = _a_s(scheduler, index)
    match prediction_type(scheduler):
        case "flow_prediction":
            return (latents - x0) / s
        case "epsilon":
            return (latents - a * x0) / s
        case "v_prediction":
            return (a * latents - x0) / s
    return x0  # sample

"""A diffusers scheduler -> the rows (timestep, c0, c1, c2) of each NFE.

Every deterministic solver served here is linear: next = c0 * latents + c1 * x0 + c2 * x0_prev. So its coefficients can be
read off the diffusers scheduler object itself, by stepping it on the three unit vectors, and no formula is written twice.
"""

import copy

import torch
from diffusers import DPMSolverMultistepScheduler

Row = tuple[float, float, float, float]
LATENTS, X0, X0_PREV = torch.eye(3).unbind()


def sampler_table(scheduler: DPMSolverMultistepScheduler, nfe: int) -> list[Row]:
    """The `nfe` rows (timestep, c0, c1, c2) of a scheduler, in execution order.

    Raises ValueError for a scheduler that is not linear or not deterministic, as far as is known here.
    """
    config = scheduler.config
    if not isinstance(scheduler, DPMSolverMultistepScheduler) or config.algorithm_type not in ("dpmsolver++", "dpmsolver"):
        raise ValueError(
            f"{type(scheduler).__name__} is not supported: the sampler must be a deterministic DPMSolverMultistepScheduler"
        )
    if config.solver_order > 2 or config.thresholding:
        raise ValueError(
            f"solver_order={config.solver_order}, thresholding={config.thresholding}: only linear solvers of order 1 and 2 do"
        )
    return [_row(scheduler, nfe, index) for index in range(nfe)]


def _row(scheduler: DPMSolverMultistepScheduler, nfe: int, index: int) -> Row:
    """Steps a fresh scheduler up to `index` so that the sample, x0 and previous x0 of that step are unit vectors."""
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(nfe)
    zero = torch.zeros(3)
    for earlier in range(index):
        x0 = X0_PREV if earlier == index - 1 else zero
        fresh.step(_prediction(fresh, earlier, zero, x0), fresh.timesteps[earlier], zero)
    stepped = fresh.step(_prediction(fresh, index, LATENTS, X0), fresh.timesteps[index], LATENTS).prev_sample
    c0, c1, c2 = (float(value) for value in stepped)
    return _exact_timestep(fresh, index), c0, c1, c2


def _exact_timestep(scheduler: DPMSolverMultistepScheduler, index: int) -> float:
    """The step's timestep. Flow samplers truncate it to a whole number for the network but not in their coefficients, so
    it is given with its fraction, which the denoiser drops again where the network is told."""
    whole = float(scheduler.timesteps[index])
    if scheduler.config.prediction_type != "flow_prediction":
        return whole
    exact = float(scheduler.sigmas[index]) * scheduler.config.num_train_timesteps
    return float(round(min(max(exact, whole), whole + 0.9999), 4))


def _prediction(scheduler: DPMSolverMultistepScheduler, index: int, latents: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """The network output that the scheduler will read as `x0` at step `index`."""
    sigma: torch.Tensor = scheduler.sigmas[index]
    a: torch.Tensor
    s: torch.Tensor
    a, s = scheduler._sigma_to_alpha_sigma_t(sigma)
    match scheduler.config.prediction_type:
        case "flow_prediction":
            return (latents - x0) / sigma
        case "epsilon":
            return (latents - a * x0) / s
        case "v_prediction":
            return (a * latents - x0) / s
    raise ValueError(
        f"prediction_type {scheduler.config.prediction_type!r} is not one of flow_prediction, epsilon, v_prediction"
    )

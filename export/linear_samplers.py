"""Which diffusers schedulers are linear, deterministic and exact at whole timesteps, and why every other is refused.

A sampler table can hold a scheduler only if next = c0 * latents + c1 * x0 + c2 * x0_prev in every step, with numbers that
depend on its configuration alone, and if the timestep of a row says a(t) and s(t), by which the denoiser reads x0. What
is listed here was read from diffusers 0.42 (diffusers/schedulers), class by class.
"""

from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

VP_PREDICTIONS = ("epsilon", "v_prediction", "sample")

# Scheduler class -> configuration field -> its legal values. CogVideoX schedulers have a field clip_sample as well (true
# by default), but their step never clips. eta is an argument of DDIM's step, not of its configuration: it is 0 here.
LEGAL: dict[Any, dict[str, tuple[Any, ...]]] = {
    DDIMScheduler: {"prediction_type": VP_PREDICTIONS, "thresholding": (False,), "clip_sample": (False,)},
    CogVideoXDDIMScheduler: {"prediction_type": VP_PREDICTIONS},
    CogVideoXDPMScheduler: {"prediction_type": VP_PREDICTIONS, "set_alpha_to_one": (True,)},
    DPMSolverMultistepScheduler: {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (1, 2),
        "prediction_type": (*VP_PREDICTIONS, "flow_prediction"),
        "thresholding": (False,),
        "variance_type": (None,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "use_lu_lambdas": (False,),
        "use_dynamic_shifting": (False,),
    },
    FlowMatchEulerDiscreteScheduler: {
        "use_dynamic_shifting": (False,),
        "stochastic_sampling": (False,),
        "invert_sigmas": (False,),
    },
}

BETWEEN = "its sigmas lie between the timesteps that the network is told, so x0 could not be read exactly: switch it off"
WHY = {
    "prediction_type": "no other meaning of the network's output is known",
    "thresholding": "thresholding of x0 is not linear: switch it off",
    "clip_sample": "clipping of x0 is not linear: switch it off, as students in a latent space need no clipping",
    "set_alpha_to_one": "its last step would add noise: switch it on, or use CogVideoXDDIMScheduler",
    "algorithm_type": "sde-* adds noise, and the second order of dpmsolver needs the latents of the step before, which no "
    "row holds; at first order dpmsolver++ is the same solver",
    "solver_order": "a row holds one x0 of the past: use order 1 or 2",
    "variance_type": "diffusers would keep three channels of the network's output: clear it, a learned variance is dropped "
    "before the sampler",
    "use_karras_sigmas": BETWEEN,
    "use_exponential_sigmas": BETWEEN,
    "use_beta_sigmas": BETWEEN,
    "use_lu_lambdas": BETWEEN,
    "use_dynamic_shifting": "the shift would follow the size of each picture: switch it off and state one shift",
    "stochastic_sampling": "it adds noise: switch it off",
    "invert_sigmas": "it takes sigma 1 for clean latents: switch it off",
}


def refuse_unsuitable(scheduler: Any, nfe: int) -> None:
    """Raises ValueError, with the field, its value, what is legal and why, where no table can hold the scheduler."""
    name, config = type(scheduler).__name__, scheduler.config
    if type(scheduler) not in LEGAL:
        known = ", ".join(kind.__name__ for kind in LEGAL)
        raise ValueError(
            f"{name} is not supported: a student's sampler must be linear and deterministic, one of {known}; "
            "for a student trained on a DDIM trajectory use DDIMScheduler.from_config(pipeline.scheduler.config)"
        )
    for field, legal in LEGAL[type(scheduler)].items():
        value = bool(config.get(field)) if False in legal else config.get(field)
        if value not in legal:
            raise ValueError(f"{name}: {field}={value!r}, legal: {', '.join(map(repr, legal))} ({WHY[field]})")
    if not isinstance(nfe, int) or not 1 <= nfe <= config.num_train_timesteps:
        raise ValueError(f"nfe={nfe!r}, legal: a whole number from 1 to {config.num_train_timesteps} (num_train_timesteps)")
    if isinstance(scheduler, CogVideoXDPMScheduler) and nfe > 1:
        raise ValueError(
            f"CogVideoXDPMScheduler: nfe={nfe}, legal: 1 (it is an SDE solver without a switch, whatever eta: every step but "
            "the last adds noise; use CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config))"
        )
    if isinstance(scheduler, DPMSolverMultistepScheduler) and bool(config.use_flow_sigmas) != is_flow(scheduler):
        raise ValueError(
            f"{name}: use_flow_sigmas={config.use_flow_sigmas} with prediction_type={config.prediction_type!r}, "
            "legal: use_flow_sigmas with 'flow_prediction' and with nothing else (the timestep must say a(t) and s(t))"
        )
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.shift != config.shift:
        raise ValueError(
            f"{name}: set_shift({scheduler.shift}) was called but its configuration says shift={config.shift}, which is what a "
            f"student folder keeps: make the scheduler with shift={scheduler.shift}"
        )


def prediction_type(scheduler: Any) -> str:
    """What the network's output means: epsilon, v_prediction, sample, or flow_prediction (a velocity, eps - x0)."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow_prediction"
    return str(scheduler.config.prediction_type)


def is_flow(scheduler: Any) -> bool:
    """Whether a = 1 - sigma and s = sigma; otherwise a^2 + s^2 = 1 by the scheduler's alphas_cumprod."""
    return prediction_type(scheduler) == "flow_prediction"


def solver_name(scheduler: Any) -> str:
    """The solver as a manifest names it: ddim, flow_euler, dpmsolver++1, dpmsolver++2, cogvideox_ddim or cogvideox_dpm."""
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return f"{scheduler.config.algorithm_type}{scheduler.config.solver_order}"
    names = {
        DDIMScheduler: "ddim",
        CogVideoXDDIMScheduler: "cogvideox_ddim",
        CogVideoXDPMScheduler: "cogvideox_dpm",
        FlowMatchEulerDiscreteScheduler: "flow_euler",
    }
    return names[type(scheduler)]

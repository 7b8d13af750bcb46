"""What a diffusers scheduler says: the noise schedule its network was trained under, and the sampler of a student of it."""

from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tdm_train.schedule import NoiseSchedule


def schedule_of(scheduler: Any) -> NoiseSchedule:
    """The noise schedule that a diffusers scheduler states; raises ValueError for one that states none known here."""
    config = scheduler.config
    train_timesteps = config.num_train_timesteps
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.get("prediction_type") == "flow_prediction":
        return NoiseSchedule("flow_prediction", train_timesteps=train_timesteps)
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{type(scheduler).__name__} has neither alphas_cumprod nor flow predictions: no schedule is known of it"
        )
    return NoiseSchedule(config.prediction_type, scheduler.alphas_cumprod.float(), train_timesteps)


def tells_whole_timesteps(scheduler: Any) -> bool:
    """Whether the network is told the whole part of a timestep alone: by every sampler here but the flow-match one."""
    return not isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def student_sampler(scheduler: Any) -> Any:
    """The deterministic first-order sampler of a student, for the diffusers scheduler of its teacher.

    DDIM on timesteps T, T - T/K, ... for epsilon, v and sample; flow-match Euler with the teacher's own shift, or
    DPM-Solver++ of first order over flow sigmas (the same update) where the teacher has that class.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    if schedule_of(scheduler).prediction_type == "flow_prediction":
        return DPMSolverMultistepScheduler.from_config(
            scheduler.config, use_flow_sigmas=True, solver_order=1, final_sigmas_type="zero"
        )
    if isinstance(scheduler, (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)):
        return CogVideoXDDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    return DDIMScheduler.from_config(
        scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, thresholding=False
    )


def sampler_grid(scheduler: Any, nfe: int, sigmas: list[float] | None = None) -> list[float]:
    """The timesteps at which a diffusers scheduler has the network evaluated in `nfe` steps, falling.

    sigmas: what it is told to stand on, which the flow-match sampler alone takes, and shifts; ValueError with any other.
    """
    started = type(scheduler).from_config(scheduler.config)
    if sigmas is None:
        started.set_timesteps(nfe)
    elif isinstance(started, FlowMatchEulerDiscreteScheduler):
        started.set_timesteps(sigmas=sigmas)
    else:
        raise ValueError(f"student.json states sigmas={sigmas} for {nfe} NFE, legal with {type(started).__name__}: timesteps")
    if schedule_of(scheduler).prediction_type != "flow_prediction":
        return [float(t) for t in started.timesteps]
    return [float(sigma) * scheduler.config.num_train_timesteps for sigma in started.sigmas[:nfe]]

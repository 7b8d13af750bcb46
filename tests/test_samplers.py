"""What is read off a diffusers scheduler: its noise schedule, and the sampler of a student."""

from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from export.sampler_table import sampler_table, told_timestep
from tdm_train.samplers import sampler_grid, schedule_of, student_sampler, tells_whole_timesteps

SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
COGVIDEOX = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
VP = [
    (PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True, steps_offset=1), DDIMScheduler),
    (EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="leading", steps_offset=1), DDIMScheduler),
    (DDIMScheduler(**SCALED_LINEAR, set_alpha_to_one=False, prediction_type="sample"), DDIMScheduler),
    (DPMSolverMultistepScheduler(beta_end=0.02), DDIMScheduler),
    (CogVideoXDPMScheduler(**COGVIDEOX, timestep_spacing="trailing"), CogVideoXDDIMScheduler),
]


@pytest.mark.parametrize(("teacher", "kind"), VP, ids=lambda value: type(value).__name__)
def test_a_student_goes_down_in_equal_steps_and_lands_on_x0_under_its_teachers_schedule(teacher: Any, kind: Any) -> None:
    sampler = student_sampler(teacher)
    assert type(sampler) is kind
    rows = sampler_table(sampler, 4)
    assert [row[0] for row in rows] == [999, 749, 499, 249]
    assert rows[-1][1:] == pytest.approx((0, 1, 0), abs=1e-6)
    theirs, ours = schedule_of(teacher), schedule_of(sampler)
    assert ours.prediction_type == theirs.prediction_type
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)


def test_a_student_of_a_flow_keeps_its_teachers_shift() -> None:
    for teacher in (FlowMatchEulerDiscreteScheduler(shift=3.0), DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0)):
        sampler = student_sampler(teacher)
        assert sampler.config.get("shift", sampler.config.get("flow_shift")) == 3
        assert schedule_of(sampler).prediction_type == "flow_prediction"
        assert sampler_table(sampler, 4)[-1][1:] == pytest.approx((0, 1, 0), abs=1e-6)


def test_training_timesteps_are_the_schedulers() -> None:
    assert schedule_of(FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)).train_timesteps == 500
    assert schedule_of(DDIMScheduler(num_train_timesteps=500)).train_timesteps == 500


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(), DPMSolverMultistepScheduler(**FLOW), DDIMScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_training_and_export_agree_on_what_the_network_is_told(scheduler: Any) -> None:
    assert (told_timestep(scheduler, 499.5) == 499) is tells_whole_timesteps(scheduler)


def test_a_scheduler_without_a_known_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="EDMEulerScheduler has neither alphas_cumprod nor flow predictions"):
        schedule_of(EDMEulerScheduler())


@pytest.mark.parametrize("nfe", [1, 3, 4])
@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(shift=3.0), DPMSolverMultistepScheduler(**FLOW), DDIMScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_grid_of_a_sampler_is_that_of_its_table(scheduler: Any, nfe: int) -> None:
    sampler = student_sampler(scheduler)
    assert sampler_grid(sampler, nfe) == pytest.approx([row[0] for row in sampler_table(sampler, nfe)], abs=1e-3)

"""A sampler table does what the diffusers scheduler does, step by step, and a scheduler that no table can hold is refused."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from export.linear_samplers import LEGAL, prediction_type, solver_name
from export.sampler_table import Row, sampler_table, told_timestep

NFES = (1, 2, 3, 4, 8)
RELEASED_GRID = [999, 856, 665, 399]  # TDM's CogVideoX-2B student
SPACINGS = st.sampled_from(["leading", "trailing", "linspace"])
BETAS = st.sampled_from(
    [{}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {"trained_betas": [0.01] * 1000}]
)
VP = ["epsilon", "v_prediction", "sample"]


@st.composite
def vp_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields that DDIM, CogVideoX and DPM schedulers share; epsilon without zero terminal SNR, where it is refused."""
    kind = draw(st.sampled_from(VP))
    zero_snr = kind != "epsilon" and draw(st.booleans())
    offset = draw(st.sampled_from([0, 1]))
    fields = {"prediction_type": kind, "rescale_betas_zero_snr": zero_snr, "steps_offset": offset}
    return {**fields, "timestep_spacing": draw(SPACINGS), **draw(BETAS)}


@st.composite
def ddim(draw: st.DrawFn) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=draw(st.booleans()), **draw(vp_fields()))


@st.composite
def cogvideox_ddim(draw: st.DrawFn) -> CogVideoXDDIMScheduler:
    shift = draw(st.sampled_from([1.0, 3.0]))
    return CogVideoXDDIMScheduler(snr_shift_scale=shift, set_alpha_to_one=draw(st.booleans()), **draw(vp_fields()))


SOLVER_FIELDS = st.fixed_dictionaries(
    {
        "solver_order": st.sampled_from([1, 2]),
        "solver_type": st.sampled_from(["midpoint", "heun"]),
        "lower_order_final": st.booleans(),
        "euler_at_final": st.booleans(),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    }
)


@st.composite
def dpm(draw: st.DrawFn) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(**draw(vp_fields()), **draw(SOLVER_FIELDS))


@st.composite
def dpm_flow(draw: st.DrawFn) -> DPMSolverMultistepScheduler:
    shift = draw(st.sampled_from([1.0, 3.0, 6.0]))
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return DPMSolverMultistepScheduler(**flow, **draw(SOLVER_FIELDS))


@st.composite
def flow_euler(draw: st.DrawFn) -> FlowMatchEulerDiscreteScheduler:
    spacing = draw(st.sampled_from(["", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]))
    shift = draw(st.sampled_from([0.5, 1.0, 3.0, 12.0]))
    return FlowMatchEulerDiscreteScheduler(shift=shift, **({spacing: True} if spacing else {}))


SAMPLERS = {
    "ddim": ddim(),
    "cogvideox_ddim": cogvideox_ddim(),
    "dpm": dpm(),
    "dpm_flow": dpm_flow(),
    "flow_euler": flow_euler(),
}


def network(latents: torch.Tensor, told: float) -> torch.Tensor:
    """A made-up nonlinear network that mixes all values and hears every fraction of a timestep."""
    size = latents.shape[-1]
    mixing = torch.linspace(-1, 1, size * size, dtype=torch.float64).reshape(size, size).to(latents.dtype)
    return torch.tanh(0.1 * latents @ mixing + told / 250) + 0.2 * torch.sin(latents)


def read_x0(scheduler: Any, timestep: float, latents: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """What a network's output means at a row's timestep, by the textbook, from nothing but that timestep."""
    kind = prediction_type(scheduler)
    if kind == "flow_prediction":
        return latents - timestep / scheduler.config.num_train_timesteps * prediction
    abar = float(scheduler.alphas_cumprod[int(timestep)])
    a, s = abar**0.5, (1 - abar) ** 0.5
    return {"epsilon": (latents - s * prediction) / a if a else latents, "v_prediction": a * latents - s * prediction}.get(
        kind, prediction
    )


def run_table(scheduler: Any, rows: list[Row], noise: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Final latents, and what the network was told."""
    latents, x0_prev, told = noise, torch.zeros_like(noise), []
    for timestep, c0, c1, c2 in rows:
        told.append(told_timestep(scheduler, timestep))
        x0 = read_x0(scheduler, timestep, latents, network(latents, told[-1]))
        latents, x0_prev = c0 * latents + c1 * x0 + c2 * x0_prev, x0
    return latents, told


def run_diffusers(scheduler: Any, noise: torch.Tensor, **grid: Any) -> tuple[torch.Tensor, list[float]]:
    """The loop of a diffusers pipeline with a copy of the scheduler."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(**grid)
    latents, told = noise, []
    for timestep in scheduler.timesteps:
        told.append(float(timestep))
        latents = scheduler.step(network(latents, told[-1]), timestep, latents).prev_sample
    return latents, told


def start(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to latents of unit size or of their own where that is larger."""
    return float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_a_table_does_what_the_scheduler_does_in_its_own_loop(
    name: str, dtype: torch.dtype, data: st.DataObject, seed: int
) -> None:
    scheduler, nfe = data.draw(SAMPLERS[name]), data.draw(st.sampled_from(NFES))
    rows = sampler_table(scheduler, nfe)
    ours, told = run_table(scheduler, rows, start(seed, dtype))
    theirs, theirs_told = run_diffusers(scheduler, start(seed, dtype), num_inference_steps=nfe)
    assert told == theirs_told
    assert difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_rows_depend_on_the_configuration_and_k_alone_and_the_scheduler_is_left_as_it_was(
    name: str, data: st.DataObject
) -> None:
    scheduler, nfe = data.draw(SAMPLERS[name]), data.draw(st.sampled_from(NFES))
    expected = sampler_table(scheduler, nfe)
    scheduler.set_timesteps(6)
    scheduler.step(torch.ones(3), scheduler.timesteps[0], torch.ones(3))
    before, generator = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    assert sampler_table(scheduler, nfe) == expected
    assert str(vars(scheduler)) == str(before)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("column", [0, 1, 2, 3], ids=["timestep", "c0", "c1", "c2"])
def test_a_spoilt_row_is_caught_by_the_comparison(name: str, column: int) -> None:
    schedulers = {
        "ddim": DDIMScheduler(clip_sample=False),
        "cogvideox_ddim": CogVideoXDDIMScheduler(prediction_type="v_prediction"),
        "dpm": DPMSolverMultistepScheduler(),
        "dpm_flow": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        "flow_euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    scheduler, rows = schedulers[name], sampler_table(schedulers[name], 4)
    spoilt = [list(row) for row in rows]
    spoilt[1][column] += 1.0 if column == 0 else 0.001
    theirs, theirs_told = run_diffusers(scheduler, start(0), num_inference_steps=4)
    ours, told = run_table(scheduler, [(t, a, b, c) for t, a, b, c in spoilt], start(0))
    assert difference(ours, theirs) > 1e-5
    assert column > 0 or told != theirs_told


@settings(deadline=None, max_examples=60)
@given(
    scheduler=st.one_of(ddim(), cogvideox_ddim()),
    grid=st.lists(st.integers(1, 999), min_size=1, max_size=8, unique=True).map(lambda steps: sorted(steps, reverse=True)),
)
def test_ddim_steps_from_each_timestep_of_an_explicit_grid_to_the_next(scheduler: Any, grid: list[int]) -> None:
    rows = sampler_table(scheduler, len(grid), timesteps=grid)
    assert [row[0] for row in rows] == grid
    abars = [*(float(scheduler.alphas_cumprod[t]) for t in grid), float(scheduler.final_alpha_cumprod)]
    for (abar, abar_next), (_, c0, c1, c2) in zip(itertools.pairwise(abars), rows, strict=True):
        ratio = ((1 - abar_next) / (1 - abar)) ** 0.5  # next = a' * x0 + s' * eps with eps = (latents - a * x0) / s
        assert (c0, c1, c2) == pytest.approx((ratio, abar_next**0.5 - abar**0.5 * ratio, 0), abs=2e-6)


@pytest.mark.parametrize("kind", [DDIMScheduler, CogVideoXDDIMScheduler])
@pytest.mark.parametrize("nfe", [1, 2, 4, 8])
def test_an_explicit_grid_that_is_the_schedulers_own_gives_its_own_rows(kind: Any, nfe: int) -> None:
    scheduler = kind(clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing")
    own = sampler_table(scheduler, nfe)
    assert sampler_table(scheduler, nfe, timesteps=[int(row[0]) for row in own]) == own


@settings(deadline=None, max_examples=40)
@given(
    scheduler=dpm(),
    grid=st.just(RELEASED_GRID)
    | st.lists(st.integers(1, 998), min_size=1, max_size=8, unique=True).map(lambda steps: sorted(steps, reverse=True)),
    seed=st.integers(0, 1000),
)
def test_dpm_takes_explicit_timesteps_as_diffusers_does(
    scheduler: DPMSolverMultistepScheduler, grid: list[int], seed: int
) -> None:
    ours, told = run_table(scheduler, sampler_table(scheduler, len(grid), timesteps=grid), start(seed))
    theirs, theirs_told = run_diffusers(scheduler, start(seed), timesteps=grid)
    assert told == theirs_told == grid
    # Order 2 multiplies x0 - x0_prev, and its rounding, by the ratio of two steps, which is large on an uneven grid.
    assert difference(ours, theirs) <= (1e-4 if scheduler.config.solver_order == 2 and grid != RELEASED_GRID else 1e-5)


@settings(deadline=None, max_examples=40)
@given(
    scheduler=st.builds(FlowMatchEulerDiscreteScheduler, shift=st.sampled_from([1.0, 3.0, 6.0])),
    grid=st.lists(st.integers(1, 100), min_size=1, max_size=8, unique=True).map(lambda steps: sorted(steps, reverse=True)),
    seed=st.integers(0, 1000),
)
def test_flow_euler_takes_explicit_sigmas_and_shifts_them_as_diffusers_does(
    scheduler: FlowMatchEulerDiscreteScheduler, grid: list[int], seed: int
) -> None:
    sigmas = [step / 100 for step in grid]
    ours, told = run_table(scheduler, sampler_table(scheduler, len(grid), sigmas=sigmas), start(seed))
    theirs, theirs_told = run_diffusers(scheduler, start(seed), sigmas=sigmas)
    assert told == theirs_told
    assert difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_dpm_over_flow_sigmas_takes_an_explicit_grid_as_it_stands(order: int, shift: float) -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": order}
    scheduler = DPMSolverMultistepScheduler(**flow, flow_shift=shift)
    rows = sampler_table(scheduler, 4, timesteps=RELEASED_GRID)
    assert rows == sampler_table(scheduler, 4, sigmas=[t / 1000 for t in RELEASED_GRID])
    assert [told_timestep(scheduler, row[0]) for row in rows] == RELEASED_GRID
    own = DPMSolverMultistepScheduler(**flow, flow_shift=6.0)
    own.set_timesteps(4)
    assert sampler_table(scheduler, 4, sigmas=own.sigmas[:-1].tolist()) == sampler_table(own, 4)
    if order == 1:  # flow Euler by another name
        euler = FlowMatchEulerDiscreteScheduler()
        for ours, theirs in zip(rows, sampler_table(euler, 4, timesteps=RELEASED_GRID), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)


def test_the_released_sd3_student_has_the_sigmas_that_its_authors_state() -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0)
    assert [row[0] / 1000 for row in sampler_table(scheduler, 4)] == pytest.approx([0.9998, 0.9472, 0.8569, 0.6664], abs=1e-4)


@pytest.mark.parametrize("kind", [DDIMScheduler, CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_one_step_from_pure_noise_is_x0_itself(kind: Any, prediction: str) -> None:
    zero_snr = {"prediction_type": prediction, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = kind(clip_sample=False, **zero_snr)
    assert float(scheduler.alphas_cumprod[-1]) == 0
    for grid in (None, [999]):
        assert sampler_table(scheduler, 1, timesteps=grid)[0] == pytest.approx((999, 0, 1, 0), abs=1e-12)


def test_cogvideox_never_clips_whatever_its_field_says() -> None:
    tables = [sampler_table(CogVideoXDDIMScheduler(clip_sample=clip), 4) for clip in (True, False)]
    assert tables[0] == tables[1]


def test_cogvideox_dpm_is_random_beyond_one_step_which_is_why_it_is_refused() -> None:
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(2)
    steps = [
        scheduler.step(torch.ones(4), None, scheduler.timesteps[0], None, torch.ones(4), generator=torch.manual_seed(seed))[0]
        for seed in (0, 1)
    ]
    assert not torch.allclose(*steps)
    with pytest.raises(ValueError, match=r"CogVideoXDPMScheduler: nfe=2, legal: 1 .*use CogVideoXDDIMScheduler"):
        sampler_table(scheduler, 2)


@pytest.mark.filterwarnings("ignore:.*algorithm_type dpmsolver is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIMScheduler(), r"DDIMScheduler: clip_sample=True, legal: False"),
        (lambda: DDIMScheduler(thresholding=True), "thresholding=True, legal: False"),
        (lambda: DDIMScheduler(clip_sample=False, prediction_type="x"), "prediction_type='x', legal: 'epsilon', 'v_pre"),
        (lambda: CogVideoXDDIMScheduler(prediction_type="x"), "prediction_type='x', legal: 'epsilon'"),
        (lambda: CogVideoXDPMScheduler(prediction_type="x"), "prediction_type='x', legal: 'epsilon'"),
        (lambda: CogVideoXDPMScheduler(set_alpha_to_one=False), "set_alpha_to_one=False, legal: True"),
        (lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "'sde-dpmsolver\\+\\+', legal: 'dpmsolver\\+"),
        (lambda: DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), "='dpmsolver', legal"),
        (lambda: DPMSolverMultistepScheduler(solver_order=3), "solver_order=3, legal: 1, 2"),
        (lambda: DPMSolverMultistepScheduler(prediction_type="x"), "prediction_type='x', legal: .*'flow_prediction'"),
        (lambda: DPMSolverMultistepScheduler(thresholding=True), "thresholding=True"),
        (lambda: DPMSolverMultistepScheduler(variance_type="learned"), "variance_type='learned', legal: None"),
        (lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True), "use_karras_sigmas=True, legal: False"),
        (lambda: DPMSolverMultistepScheduler(use_exponential_sigmas=True), "use_exponential_sigmas=True"),
        (lambda: DPMSolverMultistepScheduler(use_beta_sigmas=True), "use_beta_sigmas=True"),
        (lambda: DPMSolverMultistepScheduler(use_lu_lambdas=True), "use_lu_lambdas=True"),
        (lambda: DPMSolverMultistepScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
        (lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas=True with prediction_type='epsilon'"),
        (lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=False with"),
        (lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True, legal: False"),
        (lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True"),
        (lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (lambda: LCMScheduler(), "LCMScheduler is not supported: .* one of DDIMScheduler, "),
        (lambda: EulerAncestralDiscreteScheduler(), "EulerAncestralDiscreteScheduler is not supported"),
    ],
)
def test_a_scheduler_that_no_table_can_hold_is_refused_by_field_and_value(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_table(make(), 1)


def test_every_field_that_can_be_refused_is_a_field_of_its_scheduler() -> None:
    for kind, fields in LEGAL.items():
        assert set(fields) <= set(kind().config), kind


@pytest.mark.parametrize("kind", [DDIMScheduler, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DPMSolverMultistepScheduler])
def test_epsilon_is_refused_where_the_latents_hold_nothing_of_x0(kind: Any) -> None:
    scheduler = kind(rescale_betas_zero_snr=True, timestep_spacing="trailing", **({} if "DPM" in kind.__name__ else CLIPLESS))
    with pytest.raises(ValueError, match=r"prediction_type='epsilon' at timestep 999, .* use v_prediction or sample"):
        sampler_table(scheduler, 1)
    assert len(sampler_table(scheduler, 1, timesteps=[900])) == 1


CLIPLESS = {"clip_sample": False}
FLOW_DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("scheduler", "grid", "message"),
    [
        (DDIMScheduler(**CLIPLESS), {"timesteps": [999, 499], "sigmas": [1, 0.5]}, "give one of them"),
        (DDIMScheduler(**CLIPLESS), {"sigmas": [1, 0.5]}, "legal: timesteps"),
        (DDIMScheduler(**CLIPLESS), {"timesteps": [999]}, "legal: nfe=2 values"),
        (DDIMScheduler(**CLIPLESS), {"timesteps": [1000, 5]}, "up to 999"),
        (DDIMScheduler(**CLIPLESS), {"timesteps": [999.5 - 1, 5]}, "legal: whole numbers"),
        (DDIMScheduler(**CLIPLESS), {"timesteps": [5, 999]}, "strictly falling"),
        (DPMSolverMultistepScheduler(), {"timesteps": [5, 5]}, "strictly falling"),
        (DPMSolverMultistepScheduler(**FLOW_DPM), {"sigmas": [1.2, 0.5]}, "above 0 and up to 1"),
        (DPMSolverMultistepScheduler(**FLOW_DPM), {"sigmas": [0.5, float("nan")]}, "above 0 and up to 1"),
        (DPMSolverMultistepScheduler(**FLOW_DPM, flow_shift=1e4), {}, "strictly falling .*the shift"),
        (
            DPMSolverMultistepScheduler(**FLOW_DPM, final_sigmas_type="sigma_min"),
            {"sigmas": [0.5, 0.005]},
            "ends above the last",
        ),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {"timesteps": [999, 500]}, "legal: no shift .*give sigmas"),
        (FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), {"sigmas": [1, 0.5]}, "use_karras_sigmas=True, legal"),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": [0.5, 0.0]}, "above 0 and up to 1"),
    ],
)
def test_a_grid_that_means_nothing_to_the_scheduler_is_refused(scheduler: Any, grid: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_table(scheduler, 2, **grid)


@pytest.mark.parametrize("nfe", [0, -1, 1001, 2.0, None])
def test_a_number_of_evaluations_that_is_none_is_refused(nfe: Any) -> None:
    with pytest.raises(ValueError, match="legal: a whole number from 1 to 1000"):
        sampler_table(DDIMScheduler(**CLIPLESS), nfe)


def test_a_shift_that_the_configuration_does_not_know_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_shift(3.0)
    with pytest.raises(ValueError, match=r"set_shift\(3.0\) was called .* make the scheduler with shift=3.0"):
        sampler_table(scheduler, 4)


def test_solvers_have_names_for_the_manifest() -> None:
    assert {solver_name(kind()) for kind in LEGAL} == {"ddim", "cogvideox_ddim", "cogvideox_dpm", "dpmsolver++2", "flow_euler"}


def test_coefficients_of_epsilon_stay_exact_where_a_is_small() -> None:
    scheduler = DDIMScheduler(clip_sample=False, trained_betas=[0.0163] * 1000)
    grid = [999, 900, 500]
    abars = [*(float(scheduler.alphas_cumprod[t]) for t in grid), 1.0]
    assert abars[0] < 1e-7
    for (abar, abar_next), (_, c0, c1, _) in zip(itertools.pairwise(abars), sampler_table(scheduler, 3, grid), strict=True):
        ratio = ((1 - abar_next) / (1 - abar)) ** 0.5
        assert (c0, c1) == pytest.approx((ratio, abar_next**0.5 - abar**0.5 * ratio), abs=2e-7)

"""The bundled teacher becomes a student folder that every door opens."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from export.publish import sampler_tables
from tdm_train.checkpoint import denoiser_of, load_student, open_pipeline
from tdm_train.draws import draw_nfe
from tdm_train.prompts import encode_prompts
from tdm_train.recipes import TdmRecipe
from tdm_train.rollout import guided_x0, rollout
from tdm_train.run import Run, launch
from tdm_train.steps_aware import fold, timestep_embedding
from tdm_train.trainer import train_tdm

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "tdm_train" / "scenes" / "teacher"
PROMPTS = ["a red circle above a blue square", "a large star, black background"]
pytestmark = pytest.mark.slow


def distil(out: Path, iterations: int, **changes: Any) -> Path:
    recipe = TdmRecipe(teacher=str(TEACHER), iterations=iterations, batch=4, prompts=20, warmup=1)
    train_tdm(replace(recipe, **changes), out, resume=False)
    return out / "student"


def test_a_student_of_no_iterations_is_its_teacher(tmp_path: Path) -> None:
    student, teacher = load_student(distil(tmp_path, 0)), open_pipeline(TEACHER)
    assert not fold(student.denoiser.network, 4).any()
    theirs = teacher.transformer.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in student.pipeline.transformer.state_dict().items())


def test_a_student_goes_on_from_another_and_says_how_that_one_was_taught(tmp_path: Path) -> None:
    first = distil(tmp_path / "first", 2, guidance=3.0)
    student, same = load_student(first), load_student(distil(tmp_path / "second", 0, start=str(first), guidance=2.0))
    for mine, theirs in zip(same.denoiser.parameters(), student.denoiser.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)  # one bias is folded and unfolded again
    assert (same.description.training["guidance"], same.description.training["start"]["guidance"]) == (2.0, 3.0)
    assert str(tmp_path) not in str(same.description)


def test_a_student_of_another_k_set_or_teacher_is_no_start(tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    first = distil(tmp_path / "first", 0, nfe=(1, 2))
    with pytest.raises(ValueError, match=r"first/student' is a student with nfe=\[1, 2\], legal here: \[1, 2, 3, 4\]"):
        distil(tmp_path / "second", 0, start=str(first))
    with pytest.raises(ValueError, match="is a student with base='fewstep scenes teacher', legal here: 'pixart_sigma'"):
        distil(tmp_path / "third", 0, start=str(first), teacher=str(miniatures("pixart_sigma")), base="", **MINIATURE)
    with pytest.raises(ValueError, match=r"nowhere is not a student folder: it has no student.json"):
        distil(tmp_path / "fourth", 0, start="nowhere")
    assert not list(tmp_path.glob("*/checkpoints"))[1:]


def test_training_moves_the_student_and_diffusers_alone_samples_it_to_the_same_latents(tmp_path: Path) -> None:
    folder = distil(tmp_path, 3)
    student = load_student(folder)
    assert timestep_embedding(student.denoiser.network)[1].k_embedding.any()
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = encode_prompts(student.pipeline, PROMPTS, 32)
        ours = rollout(student.denoiser, student.denoiser.schedule, noise, text, student.grid(4)).states[0]
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        options = {"guidance_scale": 1, "use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 32}
        theirs = pipeline(PROMPTS, num_inference_steps=4, latents=noise, output_type="latent", **options).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


MINIATURE = {"text_length": 128, "batch": 2, "prompts": 4, "ema": 0.0}


def test_other_variants_of_the_objective_make_other_students(tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    exact = {"fake_loss": "velocity", "fake_target": "subinterval_dsm", "rho": "huber_vector", "random_landing": True}
    variants = [{}, exact, {"interval": "to_terminal", "rho": "mse"}, {"teacher_warmup": 2}, {"fake_updates": 2}]
    weights = []
    for index, variant in enumerate(variants):
        folder = distil(tmp_path / str(index), 2, teacher=str(miniatures("pixart_sigma")), **MINIATURE, **variant)
        student = load_student(folder)
        weights.append(torch.nn.utils.parameters_to_vector(student.denoiser.network.parameters()))
        assert student.description.training["rho"] == variant.get("rho", "huber_elementwise")
    assert all(bool(vector.isfinite().all()) for vector in weights)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(weights, 2))


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("field", ["tau_shift", "guidance_until"])
def test_what_is_set_for_one_k_changes_iterations_of_that_k_alone(
    field: str, tmp_path: Path, miniatures: Callable[[str], Path]
) -> None:
    plain, other = getattr(TdmRecipe(), field)[0], {"tau_shift": 3.0, "guidance_until": 1.0}[field]
    drawn = draw_nfe(TdmRecipe().seed, 0, (1, 2))
    settings = {"unset": (plain,), "drawn": (other, plain), "not drawn": (plain, other), "all": (other,)}
    weights = {}
    for name, values in settings.items():
        if drawn == 2 and name in ("drawn", "not drawn"):
            values = values[::-1]
        changes = {**MINIATURE, "nfe": (1, 2), "interval": "to_terminal", field: values, "precision": "no"}
        student = load_student(distil(tmp_path / name, 1, teacher=str(miniatures("pixart_sigma")), **changes))
        weights[name] = torch.nn.utils.parameters_to_vector(student.denoiser.network.parameters())
    assert torch.equal(weights["unset"], weights["not drawn"])
    assert torch.equal(weights["drawn"], weights["all"])
    assert not torch.equal(weights["unset"], weights["drawn"])


def test_a_student_that_is_told_no_k_still_serves_every_k(tmp_path: Path) -> None:
    student = load_student(distil(tmp_path, 1, k_conditioning=False))
    assert not student.description.k_conditioning
    assert student.description.nfe == [1, 2, 3, 4]
    assert set(sampler_tables(student)) == {"1", "2", "3", "4"}


def test_a_student_states_the_grids_that_its_sampler_does_not_have(tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    grids = {"nfe": (1, 2, 3, 4), "grids": ((999.0, 856.0, 665.0, 399.0),), "ladder": (8,), "ladder_iterations": 1}
    student = load_student(distil(tmp_path, 2, teacher=str(miniatures("pixart_sigma")), **MINIATURE, **grids))
    assert student.description.timesteps == {3: [999, 666, 333], 4: [999, 856, 665, 399]}
    assert [student.grid(nfe).tolist() for nfe in (1, 2, 3, 4)] == [
        [0, 999],
        [0, 499, 999],
        [0, 333, 666, 999],
        [0, 399, 665, 856, 999],
    ]
    rows = sampler_tables(student)
    assert [row[0] for row in rows["3"]] == [999, 666, 333]
    assert [row[0] for row in rows["4"]] == [999, 856, 665, 399]


def test_a_grid_that_starts_beyond_the_schedule_is_refused(tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="the grid of 1 NFE starts at 1000, legal: up to 999 for epsilon"):
        distil(tmp_path, 1, teacher=str(miniatures("pixart_sigma")), **MINIATURE, last_timestep=1000.0)


def test_the_warm_up_brings_the_student_nearer_to_its_guided_teacher(tmp_path: Path) -> None:
    pipeline = open_pipeline(TEACHER)
    teacher, noise, times = denoiser_of(pipeline), torch.randn(8, 8, 8, 8), torch.tensor([0.0, 999.0])
    warmed = load_student(distil(tmp_path, 8, nfe=(1,), teacher_warmup=8, ema=0.0, student_lr=1e-3)).denoiser
    with torch.no_grad():
        text, empty = encode_prompts(pipeline, PROMPTS * 4, 32), encode_prompts(pipeline, [""] * 8, 32)
        guided = guided_x0(teacher, noise, torch.full((8,), 999.0), text, empty, TdmRecipe().guidance)
        before, after = (
            float((rollout(student, teacher.schedule, noise, text, times).states[0] - guided).square().mean())
            for student in (teacher, warmed)
        )
    assert after < 0.8 * before


def losses(folder: Path) -> list[list[float]]:
    """The curves of a run, read from what the tracker wrote: fake score's and student's losses."""
    events = EventAccumulator(str(next((folder / "log").rglob("events*")).parent))
    events.Reload()
    return [[point.value for point in events.Scalars(name)] for name in ("fake", "student")]


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_two_processes_and_micro_batches_have_the_losses_of_one_large_batch(
    weights: str, tmp_path: Path, miniatures: Callable[[str], Path]
) -> None:
    small = {"teacher": str(miniatures("pixart_sigma")), "text_length": 128, "sizes": ("16x16",), "prompts": 4, "nfe": (1, 2)}
    recipe = TdmRecipe(**small, iterations=4, batch=4, precision="no", student_lr=1e-4, weights=weights, rank=2, sample_every=0)
    train_tdm(recipe, tmp_path / "one", resume=False)
    train_tdm(replace(recipe, batch=1, accumulation=4), tmp_path / "accumulated", resume=False)
    launch(train_tdm, 2, replace(recipe, batch=1, accumulation=2), tmp_path / "two", False)
    one = losses(tmp_path / "one")
    assert len(set(one[1])) == 4
    for other in ("accumulated", "two"):
        np.testing.assert_allclose(losses(tmp_path / other), one, rtol=1e-3)


@pytest.mark.usefixtures("full_precision")
def test_gradients_of_micro_batches_add_up_to_the_large_batchs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run, module, x = Run(tmp_path, TdmRecipe(), resume=False, precision="no"), torch.nn.Linear(3, 1), torch.randn(8, 3)
    module(x).square().mean().backward()
    whole = module.weight.grad.clone()
    module.zero_grad()
    for part in run.micro_batches(x.chunk(4), module):
        run.accelerator.backward(module(part).square().mean() / 4)
    torch.testing.assert_close(module.weight.grad, whole)

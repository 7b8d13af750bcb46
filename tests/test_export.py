"""Exported graphs equal PyTorch and diffusers, tables come from diffusers itself, and what is not proven is not published."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import export.publish
from export.onnx import halve_weights
from export.publish import ExportRefused, export_student
from export.sampler_table import sampler_table
from export.verify import Check
from server.engine.student import StudentManifest
from tdm_train.checkpoint import load_student, open_teacher, save_student, student_sampler
from tdm_train.recipes import TdmRecipe
from tdm_train.scenes.autoencoder import new_autoencoder
from tdm_train.scenes.teacher import TeacherLoss, new_transformer, save_teacher
from tdm_train.scenes.text_encoder import new_text_encoder, new_tokenizer
from tdm_train.steps_aware import make_steps_aware
from tdm_train.trainer import describe

SAMPLERS = {
    "flow, order 1": student_sampler(),
    "flow, order 2": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0),
    "epsilon, order 2": DPMSolverMultistepScheduler(),
    "v, order 2": DPMSolverMultistepScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=False),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 1000))
def test_a_table_repeats_the_diffusers_sampler_on_any_network_output(name: str, nfe: int, seed: int) -> None:
    scheduler, generator = SAMPLERS[name], torch.Generator().manual_seed(seed)
    rows = sampler_table(scheduler, nfe)
    scheduler.set_timesteps(nfe)
    latents = ours = torch.randn(16, generator=generator)
    x0_prev = torch.zeros(16)
    for index, (timestep, c0, c1, c2) in enumerate(rows):
        assert int(timestep) == int(scheduler.timesteps[index])
        prediction = torch.randn(16, generator=generator)
        x0 = read_x0(scheduler, index, ours, prediction)
        ours, x0_prev = c0 * ours + c1 * x0 + c2 * x0_prev, x0
        latents = scheduler.step(prediction, scheduler.timesteps[index], latents).prev_sample
        torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)


def read_x0(
    scheduler: DPMSolverMultistepScheduler, index: int, latents: torch.Tensor, prediction: torch.Tensor
) -> torch.Tensor:
    """What a network's output means at a step, by the textbook."""
    sigma, kind = scheduler.sigmas[index], scheduler.config.prediction_type
    if kind == "flow_prediction":
        return latents - sigma * prediction
    a = 1 / (1 + sigma**2) ** 0.5
    s = sigma * a
    return (latents - s * prediction) / a if kind == "epsilon" else a * latents - s * prediction


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")])
def test_a_sampler_not_known_to_be_linear_and_deterministic_is_refused(scheduler: object) -> None:
    with pytest.raises(ValueError, match="must be a deterministic DPMSolverMultistepScheduler"):
        sampler_table(scheduler, 4)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight student of the bundled student's own classes, made the way training makes one."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    text_encoder = new_text_encoder(len(tokenizer))
    save_teacher(TeacherLoss(new_transformer()), text_encoder, new_autoencoder(), tokenizer, folder / "teacher")
    teacher = open_teacher(folder / "teacher")
    transformer = teacher.transformer
    make_steps_aware(transformer, (1, 2, 3, 4))
    torch.nn.init.normal_(transformer.adaln_single.emb.k_embedding)
    save_student(teacher, transformer, describe(TdmRecipe()), folder / "student")
    return folder / "student"


@pytest.fixture(scope="module")
def published(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Check]]:
    return export_student(student_folder, tmp_path_factory.mktemp("repository"))


@pytest.mark.slow
def test_every_graph_equals_eager_and_every_k_equals_the_diffusers_pipeline(published: tuple[Path, list[Check]]) -> None:
    checks = {check.what: check for check in published[1]}
    assert all(check.passed for check in checks.values())
    assert {f"{nfe} exported steps equal the diffusers pipeline" for nfe in (1, 2, 3, 4)} <= set(checks)
    assert max(check.error for what, check in checks.items() if "diffusers" in what) <= 1e-5


@pytest.mark.slow
def test_the_published_folder_is_whole_and_small(published: tuple[Path, list[Check]]) -> None:
    folder, _ = published
    names = {file.name for file in (folder / "1").iterdir()}
    assert names == {"model.py", "student.json", "text_encoder.onnx", "student_step.onnx", "vae_decoder.onnx", "tokenizer.json"}
    assert "decoupled" in (folder / "config.pbtxt").read_text()
    StudentManifest.model_validate(json.loads((folder / "1" / "student.json").read_text()))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 20e6


@pytest.mark.slow
def test_k_conditioning_travels_through_folder_and_reload(student_folder: Path) -> None:
    student = load_student(student_folder)
    vectors = student.pipeline.transformer.adaln_single.emb.k_embedding
    assert vectors.shape == (5, 192)
    assert float(vectors.detach().abs().min(1).values.max()) > 0
    assert student.nfe_set == (1, 2, 3, 4)


@pytest.mark.slow
def test_nothing_is_published_when_a_check_fails(student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "old").write_text("the version before")

    def broken_build(*arguments: object) -> list[Check]:
        return [dataclasses.replace(Check("student_step equals eager, batch 1", 0, 1e-4), error=float("nan"))]

    monkeypatch.setattr(export.publish, "build", broken_build)
    with pytest.raises(ExportRefused, match="student_step equals eager, batch 1: nan"):
        export_student(student_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert (tmp_path / "scenes" / "old").read_text() == "the version before"


def test_a_folder_that_is_no_student_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a student folder: it has no student\.json"):
        export_student(tmp_path, tmp_path)


def test_weights_are_halved_only_where_half_precision_holds_them_exactly() -> None:
    exact, inexact = np.full(64, 0.5, np.float32), np.full(64, 0.1, np.float32)
    weights = [onnx.numpy_helper.from_array(exact, "exact"), onnx.numpy_helper.from_array(inexact, "inexact")]
    node = onnx.helper.make_node("Add", ["exact", "inexact"], ["sum"])
    output = onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, [64])
    model = halve_weights(onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [], [output], weights)))
    assert {weight.name for weight in model.graph.initializer} == {"exact.half", "inexact"}
    onnx.checker.check_model(model)

"""Every family's exported student does what diffusers' own pipeline does, with every solver, at every K and size."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from export.families import FAMILIES
from export.publish import TINY, export_student, latent_shapes, sampler_tables
from export.reference import diffusers_latents
from export.report import Report
from export.verify import PROMPTS, exported_latents
from export.video_decoders import VideoDecoder
from server.engine.engine import Engine
from server.engine.request import Request
from server.engine.student import GRAPHS
from tdm_train.backbones import backbone_of
from tdm_train.checkpoint import Student, load_student
from tdm_train.description import Family
from tests.miniatures import FRAMES, LADDER, MINIATURES, RELEASED_GRID, VIDEOS, save_miniature_student, tiny_autoencoder

EPSILON = ("pixart_alpha", "pixart_sigma", "stable_diffusion", "sdxl")


@dataclass(frozen=True)
class Exported:
    """A miniature student and what was published of it."""

    folder: Path
    student: Student
    published: Path
    report: Report


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Name of a miniature -> its export; each is exported once."""
    made: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in made:
            folder = save_miniature_student(name, tmp_path_factory.mktemp(name))
            published, report = export_student(folder, folder.parent / "repository")
            made[name] = Exported(folder, load_student(folder), published, report)
        return made[name]

    return export


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MINIATURES)
def test_every_family_is_proven_equal_to_eager_and_to_diffusers(name: str, exported: Callable[[str], Exported]) -> None:
    checks = {check.what: check for check in exported(name).report.checks}
    assert all(check.passed for check in checks.values())
    against_diffusers = [check for check in checks.values() if check.against == "diffusers" and not check.levels]
    assert max(check.error for check in against_diffusers) <= 1e-5
    named = {f"{nfe} exported steps equal the diffusers pipeline" for nfe in LADDER}
    batched = set(GRAPHS)
    if name in VIDEOS:
        named |= {"vae_decoder_next equals eager, batch 1"}
        batched -= {"vae_decoder"}
    else:
        named |= {"4 exported steps equal the diffusers pipeline at 48x32"}
        assert any(what.startswith("student_step equals eager, latents") for what in checks)
    assert named <= set(checks)
    assert {check.graph for check in checks.values() if check.against == "itself" and check.error == 0} == batched


def solvers() -> list[Any]:
    """(miniature, what the solver is called, scheduler class, changes to the miniature's own configuration)."""
    dpm = DPMSolverMultistepScheduler
    deterministic = {"clip_sample": False, "set_alpha_to_one": True}
    rows: list[tuple[str, str, type, dict[str, Any]]] = []
    for name in EPSILON:
        rows.append((name, "ddim", DDIMScheduler, deterministic))
        rows += [(name, f"dpmsolver++{order}", dpm, {"solver_order": order}) for order in (1, 2)]
    for name in VIDEOS:
        rows.append((name, "cogvideox_ddim", CogVideoXDDIMScheduler, {}))
        rows.append((name, "cogvideox_dpm", CogVideoXDPMScheduler, {"set_alpha_to_one": True}))
    rows += [
        ("sd3", f"flow_euler shift {shift:g}", FlowMatchEulerDiscreteScheduler, {"shift": shift}) for shift in (1.0, 3.0, 6.0)
    ]
    return [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in rows]


def with_tables(engine: Engine, student: Student) -> Engine:
    """The engine with the sampler tables of another solver or grid."""
    tables = {int(nfe): np.array(rows, np.float32) for nfe, rows in sampler_tables(student).items()}
    return dataclasses.replace(engine, tables=tables)


def difference_from_diffusers(engine: Engine, student: Student, nfe: int) -> float:
    """The largest difference of latents after `nfe` NFEs, in units of their largest where that is above 1."""
    size, shape = next(iter(engine.manifest.sizes.items()))
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(nfe))
    ours = exported_latents(engine, noise.numpy(), nfe, size)
    theirs = diffusers_latents(student, list(PROMPTS), noise, nfe)
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "solver", "kind", "changes"), solvers())
def test_exported_steps_equal_the_pipeline_with_every_solver_at_every_k(
    name: str, solver: str, kind: Any, changes: dict[str, Any], exported: Callable[[str], Exported]
) -> None:
    given = exported(name)
    # CogVideoXDPMScheduler's other steps add noise, and PixArtAlphaPipeline breaks with one step of this sampler.
    ladder = {(CogVideoXDPMScheduler, name): [1], (DPMSolverMultistepScheduler, "pixart_alpha"): LADDER[1:]}.get(
        (kind, name), LADDER
    )
    pipeline = load_student(given.folder).pipeline
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
    described = given.student.description.model_copy(update={"nfe": ladder})
    student = dataclasses.replace(given.student, pipeline=given.student.pipeline, description=described)
    before, given.student.pipeline.scheduler = given.student.pipeline.scheduler, pipeline.scheduler
    try:
        engine = with_tables(Engine.open(given.published), student)
        assert max(difference_from_diffusers(engine, student, nfe) for nfe in ladder) <= 1e-5
    finally:
        given.student.pipeline.scheduler = before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cogvideox_2b", {"timesteps": RELEASED_GRID}),  # TDM's released student
        ("sd3", {"sigmas": {2: [1.0, 0.6]}}),
        ("stable_diffusion", {"timesteps": {2: [901.0, 399.0], 3: [999.0, 500.0, 20.0]}}),
    ],
)
def test_a_student_s_own_grid_is_run_as_stated(name: str, changes: dict[str, Any], exported: Callable[[str], Exported]) -> None:
    given = exported(name)
    student = dataclasses.replace(given.student, description=given.student.description.model_copy(update=changes))
    engine = with_tables(Engine.open(given.published), student)
    (grids,) = changes.values()
    for nfe, grid in grids.items():
        told = engine.tables[nfe][:, 0]
        assert name == "sd3" or told.tolist() == grid
        assert difference_from_diffusers(engine, student, nfe) <= 1e-5
        assert difference_from_diffusers(Engine.open(given.published), student, nfe) > 1e-3  # the scheduler's own grid


def test_the_engine_makes_the_pipeline_s_video_on_the_grid_of_the_released_student(video_repository: Path) -> None:
    engine, student = Engine.open(video_repository / "cogvideox-2b"), load_student(video_repository.parent / "student")
    request = Request(PROMPTS[0], 7, 0, 4, "48x32")
    progress = engine.prepare(request)
    noise = torch.from_numpy(progress.latents.copy())
    told = [progress.table[step, 0] for step in range(4)]
    while progress.remaining:
        assert engine.step([progress]) == [None]
    theirs = diffusers_latents(student, [PROMPTS[0]], noise, 4)
    assert told == RELEASED_GRID[4]
    assert np.abs(progress.latents - theirs).max() <= 1e-5 * max(1.0, np.abs(theirs).max())
    with torch.no_grad():
        expected = VideoDecoder(student.pipeline.vae)(torch.from_numpy(theirs))[0].numpy()
    different = np.abs(engine.run(request).image.astype(int) - expected)
    assert different.max() <= 1
    assert different.mean() < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_flow_student_of_a_dpm_sampler_is_told_whole_timesteps(tmp_path: Path) -> None:
    sampler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0, solver_order=2, final_sigmas_type="zero"
    )
    folder = save_miniature_student("sd3", tmp_path, sampler, sizes=["64x64"], k_conditioning=False)
    published, report = export_student(folder, tmp_path / "repository")
    against_diffusers = [check for check in report.checks if check.against == "diffusers" and not check.levels]
    assert len(against_diffusers) == len(LADDER)
    assert max(check.error for check in against_diffusers) <= 1e-5
    engine = Engine.open(published)
    assert engine.manifest.solver == "dpmsolver++2"
    assert "nfe" not in engine.manifest.tensors("student_step").inputs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_decoder_is_exported_beside_the_full_one_under_a_name_of_its_own(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    given = exported("stable_diffusion")
    folder = shutil.copytree(given.folder, tmp_path / "student")
    with pytest.raises(ValueError, match="has no tiny decoder: vae_tiny"):
        export_student(folder, tmp_path / "repository", decoder="tiny")
    tiny_autoencoder().save_pretrained(folder / TINY)
    published, report = export_student(folder, tmp_path / "repository", decoder="tiny")
    assert published.name == "stable-diffusion-tiny"
    assert all(check.passed for check in report.checks)
    engine, full = Engine.open(published), Engine.open(given.published)
    assert engine.manifest.decoder == "tiny"
    request = Request("a red circle", 7, 0, 4, "48x32")
    assert engine.run(request).image.shape == full.run(request).image.shape == (32, 48, 3)
    assert not np.array_equal(engine.run(request).image, full.run(request).image)


@pytest.mark.slow
def test_a_video_comes_out_of_the_engine_with_all_its_frames(exported: Callable[[str], Exported]) -> None:
    engine = Engine.open(exported("cogvideox_2b").published)
    result = engine.run(Request("a red circle", 7, 0, 2, "48x32"))
    assert result.image.shape == (FRAMES, 32, 48, 3)
    assert engine.manifest.sizes == {"48x32": [5, 4, 4, 6]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_sigma", "sdxl", "sd3", "stable_diffusion"])
def test_the_exported_tokenisers_read_a_prompt_as_the_pipeline_does(name: str, exported: Callable[[str], Exported]) -> None:
    given, prompt = exported(name), "  A RED   circle, above a Blue square!"
    text = Engine.open(given.published).text_encoder.encode(prompt)
    pipeline, length = given.student.pipeline, given.student.description.text_length
    eager = backbone_of(pipeline).encode(pipeline, [prompt], length)
    told = {"text_emb": eager.emb} | ({} if eager.pooled is None else {"pooled": eager.pooled})
    assert {condition for condition in text.conditions if condition != "mask"} == set(told)
    for condition, theirs in told.items():
        np.testing.assert_allclose(text.conditions[condition], theirs.numpy(), rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.slow
def test_equal_seeds_give_equal_pixels_in_every_family(exported: Callable[[str], Exported]) -> None:
    for name in MINIATURES:
        engine = Engine.open(exported(name).published)
        size = next(iter(engine.manifest.sizes))
        members = [engine.prepare(Request("a red circle", seed, 0, 3, size)) for seed in (1, 2, 3)]
        for _ in range(3):
            assert engine.step(members) == [None] * 3
        alone = engine.run(Request("a red circle", 2, 0, 3, size))
        (together,) = engine.decode(size, [members[1].latents])
        assert np.array_equal(together, alone.image), name


def test_a_size_that_the_network_cannot_take_is_refused_by_name(tmp_path: Path) -> None:
    student = load_student(save_miniature_student("stable_diffusion", tmp_path))
    for size, legal in (("60x64", "multiples of 8 pixels"), ("50x50", "multiples of 4 pixels")):
        described = student.description.model_copy(update={"sizes": [size]})
        with pytest.raises(ValueError, match=rf"{size}.*{legal}"):
            latent_shapes(dataclasses.replace(student, description=described))


def test_a_student_of_videos_has_one_size(tmp_path: Path) -> None:
    student = load_student(save_miniature_student("cogvideox_2b", tmp_path))
    described = student.description.model_copy(update={"sizes": ["48x32", "96x64"]})
    with pytest.raises(ValueError, match="exported for one size"):
        latent_shapes(dataclasses.replace(student, description=described))


def test_a_sampler_that_adds_noise_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = save_miniature_student("stable_diffusion", tmp_path, EulerAncestralDiscreteScheduler())
    with pytest.raises(ValueError, match=r"EulerAncestralDiscreteScheduler.*is not supported"):
        export_student(folder, tmp_path / "repository")
    assert not list((tmp_path / "repository").iterdir())


@pytest.mark.parametrize("missing", ["vae", "text_encoder_2", "tokenizer_2"])
def test_a_missing_component_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    folder = save_miniature_student("sdxl", tmp_path)
    shutil.rmtree(folder / missing)
    with pytest.raises(ValueError, match=missing):
        export_student(folder, tmp_path / "repository")


def test_every_family_of_the_trainer_can_be_exported() -> None:
    assert set(FAMILIES) == set(get_args(Family))


def test_a_pipeline_saved_without_a_text_encoder_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_miniature_student("sd3", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected .*text_encoder_3.*but only"):
        export_student(folder, tmp_path / "repository")

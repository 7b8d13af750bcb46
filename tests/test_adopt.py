"""A released adapter becomes a student folder that makes what the authors' own example makes, or nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from export.sampler_table import sampler_table
from fewstep import app
from tdm_train.adopt import adopt
from tdm_train.backbones import backbone_of
from tdm_train.checkpoint import denoiser_of, load_student
from tests.miniatures import FRAMES, HEIGHT, PROMPTS, T5_LENGTH, WIDTH
from tests.releases import BASES, RELEASES, as_authors_run_it, latents, write_release

every_release = pytest.mark.parametrize("name", RELEASES)


@pytest.fixture(scope="module")
def released(miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a release -> its file, made when first asked for."""
    files: dict[str, Path] = {}

    def file(name: str) -> Path:
        if name not in files:
            files[name] = write_release(name, miniatures(BASES[name]), tmp_path_factory.mktemp(name))
        return files[name]

    return file


@pytest.fixture(scope="module")
def adopted(
    miniatures: Callable[[str], Path], released: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Name of a release -> the student folder of it, in full precision, made when first asked for."""
    folders = tmp_path_factory.mktemp("adopted")

    def folder(name: str) -> Path:
        if not (folders / name).exists():
            adopt(RELEASES[name], miniatures(BASES[name]), released(name), folders / name, torch.float32)
        return folders / name

    return folder


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in units of the latents' own deviation where that is above 1."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) / max(1.0, float(theirs.std()))


@every_release
def test_the_folder_makes_what_base_and_adapter_make_at_the_stated_scale_and_sampler(
    name: str, adopted: Any, released: Any, miniatures: Any
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(adopted(name), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    made = latents(pipeline, name)
    scale = RELEASES[name].student.adapter_scale
    assert scale is not None
    stated = latents(as_authors_run_it(name, miniatures(BASES[name]), released(name), scale), name)
    other = latents(as_authors_run_it(name, miniatures(BASES[name]), released(name), 0.125 if scale == 1 else 1.0), name)
    assert difference(made, stated) <= 1e-5
    assert difference(made, other) > 0.1


@every_release
def test_student_json_says_how_the_student_is_run(name: str, adopted: Any) -> None:
    student = load_student(adopted(name))
    assert student.description == RELEASES[name].student
    assert student.description.training["released"] == f"Luo-Yihong/{name}"
    assert (student.description.nfe, student.description.k_conditioning) == ([4], False)


@every_release
def test_the_adapter_lies_beside_the_weights_as_safetensors_that_diffusers_opens(
    name: str, adopted: Any, miniatures: Any, released: Any
) -> None:
    scale = RELEASES[name].student.adapter_scale
    assert scale is not None
    kept = adopted(name) / "pytorch_lora_weights.safetensors"
    pipeline = DiffusionPipeline.from_pretrained(miniatures(BASES[name]), dtype=torch.float32)
    pipeline.load_lora_weights(str(kept.parent), weight_name=kept.name, adapter_name="kept")
    pipeline.set_adapters(["kept"], [scale])
    getattr(pipeline, backbone_of(pipeline).NETWORK).float()
    pipeline.scheduler = RELEASES[name].new_sampler()
    pipeline.set_progress_bar_config(disable=True)
    authors = as_authors_run_it(name, miniatures(BASES[name]), released(name), scale)
    assert difference(latents(pipeline, name), latents(authors, name)) <= 1e-5


@torch.no_grad()
def test_the_video_student_runs_on_the_timesteps_it_was_trained_on(adopted: Any, miniatures: Any, released: Any) -> None:
    name, steps = "TDM_CogVideoX-2B_LoRA", [999, 856, 665, 399]
    student = load_student(adopted(name))
    assert student.description.timesteps == {4: steps}
    authors = as_authors_run_it(name, miniatures(BASES[name]), released(name), 1.0)
    text = backbone_of(authors).encode(authors, PROMPTS, T5_LENGTH)
    shape = backbone_of(authors).latent_shape(authors, WIDTH, HEIGHT, FRAMES)
    noise = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(3))
    rows = sampler_table(student.pipeline.scheduler, 4, timesteps=student.description.timesteps[4])
    assert [row[0] for row in rows] == steps
    made, x_t = noise, noise
    for timestep, c0, c1, _ in rows:
        x0, _ = student.denoiser(made, torch.full((len(PROMPTS),), timestep), text)
        made = c0 * made + c1 * x0
    denoiser = denoiser_of(authors)
    for here, there in zip(steps, [*steps[1:], 0], strict=True):  # DDIM from one timestep to the next, the last to clean
        x0, eps = denoiser(x_t, torch.full((len(PROMPTS),), float(here)), text)
        a, s = denoiser.schedule.a_s(torch.tensor([float(there)]))
        x_t = a * x0 + s * eps
    assert difference(made, x_t) <= 1e-5


def test_half_precision_rounds_the_weights_and_nothing_else(
    adopted: Any, miniatures: Any, released: Any, tmp_path: Path
) -> None:
    name = "TDM_sd3_lora"
    adopt(RELEASES[name], miniatures(BASES[name]), released(name), tmp_path / "half")
    half, full = (load_student(folder).pipeline.transformer.state_dict() for folder in (tmp_path / "half", adopted(name)))
    assert half.keys() == full.keys()
    assert all(torch.equal(half[key], full[key].half().float()) for key in full)
    assert [file.name for file in tmp_path.iterdir()] == ["half"]


@pytest.mark.parametrize(
    ("name", "base", "changes", "said"),
    [
        ("TDM_sd3_lora", "stable_diffusion", {}, "is a StableDiffusionPipeline, tdm-sd3 stands on a StableDiffusion3Pipeline"),
        (
            "TDM_sd3_lora",
            "sd3",
            {"network": {"qk_norm": None}},
            "its transformer has qk_norm='rms_norm', tdm-sd3 stands on None",
        ),
        ("TDM_sd3_lora", "sd3", {"network": {"surprise": 1}}, "surprise=None, tdm-sd3 stands on 1"),
        (
            "TDM_CogVideoX-2B_LoRA",
            "cogvideox_5b",
            {},
            "use_rotary_positional_embeddings=True, tdm-cogvideox-2b stands on False",
        ),
        (
            "TDM_CogVideoX-2B_LoRA",
            "cogvideox_5b",
            {"network": {"num_layers": 2}},
            r"the noise schedule \(betas\) of its CogVideoXDDIMScheduler is not that of the sampler of tdm-cogvideox-2b",
        ),
        (
            "TDM_dreamshaper_LoRA",
            "stable_diffusion",
            {"sampler": RELEASES["TDM_dreamshaper_LoRA"].sampler | {"prediction_type": "v_prediction"}},
            "its DDIMScheduler says prediction_type='epsilon', the sampler of tdm-dreamshaper 'v_prediction'",
        ),
    ],
)
def test_another_base_is_refused_before_its_weights_are_read(
    name: str, base: str, changes: dict[str, Any], said: str, miniatures: Any, released: Any, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    for file in miniatures(base).rglob("*.json"):  # a folder without weights: whatever reads them fails
        copy = bare / file.relative_to(miniatures(base))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=said):
        adopt(RELEASES[name].model_copy(update=changes), bare, released(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("student", "sampler", "said"),
    [
        ({"sizes": ["48x33"]}, {}, "size 48x33, legal: multiples of 4 pixels"),
        ({"text_length": 76}, {}, "text_length=76, legal: 77"),
        ({}, {"steps_offset": 0}, "steps_offset is 0 in the release, but StableDiffusionPipeline sets it to 1"),
    ],
)
def test_what_the_base_cannot_do_is_refused_and_nothing_is_left(
    student: dict[str, Any], sampler: dict[str, Any], said: str, miniatures: Any, released: Any, tmp_path: Path
) -> None:
    release = RELEASES["TDM_dreamshaper_LoRA"]
    changes = {"student": release.student.model_copy(update=student), "sampler": release.sampler | sampler}
    release = release.model_copy(update=changes)
    with pytest.raises(ValueError, match=said):
        adopt(release, miniatures("stable_diffusion"), released("TDM_dreamshaper_LoRA"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_makes_a_folder_by_a_file_of_ones_own_and_never_writes_over_one(
    miniatures: Any, released: Any, tmp_path: Path
) -> None:
    release = tmp_path / "mine.toml"
    release.write_text("""
layout = "kohya"
pipeline = "StableDiffusionPipeline"
network = {block_out_channels = [8, 16]}
grid = "sampler"
guidance_scale = 1
[sampler]
_class_name = "DDIMScheduler"
beta_schedule = "scaled_linear"
beta_start = 0.00085
beta_end = 0.012
clip_sample = false
steps_offset = 1
timestep_spacing = "trailing"
[student]
name = "mine"
family = "stable_diffusion"
base = "a miniature"
revision = "main"
nfe = [2, 4]
default_nfe = 4
text_length = 77
sizes = ["48x32"]
k_conditioning = false
adapter_scale = 0.5
training = {released = "nobody/nothing"}
""")
    name = "TDM_dreamshaper_LoRA"
    words = ["adopt", str(release), str(miniatures(BASES[name])), str(released(name)), "--out", str(tmp_path / "mine")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert json.loads((tmp_path / "mine/student.json").read_text())["nfe"] == [2, 4]
    assert json.loads((tmp_path / "mine/scheduler/scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "exists already" in again.stderr

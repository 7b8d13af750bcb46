"""A student of any backbone goes through its folder whole, and a folder that contradicts itself is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from tdm_train.backbones import backbone_of
from tdm_train.checkpoint import K_VECTORS, load_student, open_pipeline, save_student
from tdm_train.denoiser import Text
from tdm_train.description import Description
from tdm_train.steps_aware import make_steps_aware, timestep_embedding
from tests.miniatures import CLIP_LENGTH, FRAMES, HEIGHT, MINIATURES, PROMPTS, T5_LENGTH, WIDTH


def describe(pipeline: Any, **fields: Any) -> Description:
    family = backbone_of(pipeline).FAMILY
    video = {"frames": FRAMES, "fps": 8} if family == "cogvideox" else {}
    stated = {
        "name": "tiny",
        "family": family,
        "base": "random",
        "revision": "1",
        "nfe": [1, 4],
        "default_nfe": 4,
        "text_length": CLIP_LENGTH if family in ("stable_diffusion", "sdxl") else T5_LENGTH,
        "sizes": [f"{WIDTH}x{HEIGHT}"],
        "k_conditioning": True,
        "adapter_scale": None,
        "training": {},
    }
    return Description(**{**stated, **video, **fields})


def steps_aware_student(pipeline: Any, folder: Path) -> Path:
    """A student of random K vectors, saved as training saves one."""
    torch.manual_seed(0)
    network = getattr(pipeline, backbone_of(pipeline).NETWORK)
    make_steps_aware(network, (1, 4))
    torch.nn.init.normal_(timestep_embedding(network)[1].k_embedding)
    save_student(pipeline, network, describe(pipeline), folder)
    return folder


@pytest.fixture
def student_folder(miniatures: Callable[[str], Path], tmp_path: Path) -> Path:
    return steps_aware_student(open_pipeline(miniatures("stable_diffusion")), tmp_path / "student")


@torch.no_grad()
def predict(student: Any, text: Text, nfe: int | None) -> torch.Tensor:
    described = student.description
    shape = backbone_of(student.pipeline).latent_shape(student.pipeline, WIDTH, HEIGHT, described.frames)
    noise = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(0))
    told = None if nfe is None else torch.full((len(PROMPTS),), nfe)
    x0, _ = student.denoiser(noise, torch.full((len(PROMPTS),), 500.0), text, told)
    return x0


@pytest.mark.parametrize("name", MINIATURES)
def test_a_saved_student_is_the_same_at_every_k_again_and_again(
    name: str, miniatures: Callable[[str], Path], tmp_path: Path
) -> None:
    first = load_student(steps_aware_student(open_pipeline(miniatures(name)), tmp_path / "first"))
    text = backbone_of(first.pipeline).encode(first.pipeline, PROMPTS, first.description.text_length)
    at = {nfe: predict(first, text, nfe) for nfe in first.nfe_set}
    assert float((at[1] - at[4]).abs().mean()) > 1e-3
    sampler = first.pipeline.scheduler.config
    save_student(first.pipeline, first.denoiser.network, first.description, tmp_path / "second", first.pipeline.scheduler)
    second = load_student(tmp_path / "second")
    assert second.description == first.description
    assert second.pipeline.scheduler.config == sampler
    for nfe in first.nfe_set:  # weights are halved when saved, so a fold and an unfold cost a rounding
        torch.testing.assert_close(predict(second, text, nfe), at[nfe], rtol=0, atol=0.02 * float(at[nfe].std()))


@pytest.mark.parametrize("name", MINIATURES)
def test_diffusers_alone_opens_a_student_at_its_largest_k(name: str, miniatures: Callable[[str], Path], tmp_path: Path) -> None:
    teacher = open_pipeline(miniatures(name))
    config = {key: value for key, value in teacher.config.items() if not isinstance(value, (tuple, list))}
    student = load_student(steps_aware_student(teacher, tmp_path))
    text = backbone_of(student.pipeline).encode(student.pipeline, PROMPTS, student.description.text_length)
    plain = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(plain) is type(teacher)
    assert {key: plain.config[key] for key in config if key != "_name_or_path"} == {
        key: value for key, value in config.items() if key != "_name_or_path"
    }
    network = getattr(plain, backbone_of(plain).NETWORK)
    at_4 = predict(student, text, 4)
    student.denoiser.network = network
    torch.testing.assert_close(predict(student, text, None), at_4, rtol=1e-4, atol=1e-4)


def test_a_student_without_k_conditioning_has_no_vectors_and_hears_no_nfe(
    miniatures: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline = open_pipeline(miniatures("sd3"))
    save_student(pipeline, pipeline.transformer, describe(pipeline, k_conditioning=False), tmp_path)
    student = load_student(tmp_path)
    text = backbone_of(student.pipeline).encode(student.pipeline, PROMPTS, T5_LENGTH)
    assert not (tmp_path / K_VECTORS).exists()
    assert torch.equal(predict(student, text, 1), predict(student, text, 4))


def test_the_sampler_of_a_student_is_the_one_it_was_saved_with(miniatures: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline = open_pipeline(miniatures("stable_diffusion"))
    sampler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    save_student(pipeline, pipeline.unet, describe(pipeline, k_conditioning=False), tmp_path, sampler)
    assert load_student(tmp_path).pipeline.scheduler.config.timestep_spacing == "linspace"


def change(folder: Path, **fields: Any) -> None:
    file = folder / "student.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_folder_that_contradicts_its_description_is_refused(student_folder: Path) -> None:
    change(student_folder, k_conditioning=False)
    with pytest.raises(ValueError, match=r"has k_conditioning.safetensors, but .* k_conditioning=False"):
        load_student(student_folder)
    change(student_folder, k_conditioning=True, family="sdxl")
    with pytest.raises(ValueError, match="says family 'sdxl', its pipeline is of 'stable_diffusion'"):
        load_student(student_folder)
    change(student_folder, family="stable_diffusion", nfe=[1, 2, 4, 8])
    with pytest.raises(ValueError, match=r"has 5 vectors, nfe \[1, 2, 4, 8\] needs 9"):
        load_student(student_folder)
    (student_folder / K_VECTORS).unlink()
    with pytest.raises(ValueError, match=r"lacks k_conditioning.safetensors, but .* k_conditioning=True"):
        load_student(student_folder)


def test_a_place_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, "/nowhere", "no/such/folder", "nowhere"):
        with pytest.raises(ValueError, match="is not a diffusers folder"):
            open_pipeline(place)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fused attention is kept where a GPU runs it")
def test_without_a_gpu_attention_is_plain_where_the_class_has_no_kind_of_its_own(miniatures: Callable[[str], Path]) -> None:
    unet, vae = (getattr(open_pipeline(miniatures("sdxl")), part) for part in ("unet", "vae"))
    assert {type(one) for part in (unet, vae) for one in part.attn_processors.values()} == {AttnProcessor}
    joint = open_pipeline(miniatures("sd3")).transformer.attn_processors.values()
    assert AttnProcessor not in {type(one) for one in joint}

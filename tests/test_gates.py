"""A run that cannot become a student is stopped with the reason, and one that can is not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tdm_train.checkpoint import open_pipeline
from tdm_train.gates import BadRunError, Quality, refuse_collapse, refuse_not_finite
from tdm_train.recipes import RECIPES
from tdm_train.samples import decode, sharpness, sheet
from tdm_train.tdm_recipe import TdmRecipe
from tdm_train.trainer import train_tdm
from tests.miniatures import PROMPTS, T5_LENGTH

TEACHER, START = Quality(1.0, 0.02, 0.9), Quality(0.8, 0.004, 0.6)


def test_samples_between_the_teachers_and_those_the_student_began_with_pass() -> None:
    for quality in (TEACHER, START, Quality(0.9, 0.01, 0.7), Quality(0.41, 0.0011, 0.31)):
        refuse_collapse(quality, (TEACHER, START), 10)


@pytest.mark.parametrize(
    ("quality", "said"),
    [
        (Quality(2.1, 0.02, 0.9), r"iteration 10: latents are off-norm: 2.1, where .* make 0.4 to 2 legal"),
        (Quality(0.3, 0.02, 0.9), "latents are off-norm: 0.3"),
        (Quality(1.0, 0.0009, 0.9), "sharpness has collapsed: 0.0009, where .* 0.001 or more legal"),
        (Quality(1.0, 0.02, 0.29), "prompts are no longer followed: 0.29, where .* 0.3 or more legal"),
        (Quality(float("nan"), 0.02, 0.9), "sample_norm is nan"),
    ],
)
def test_collapsed_samples_stop_the_run_with_the_reason(quality: Quality, said: str) -> None:
    with pytest.raises(BadRunError, match=said):
        refuse_collapse(quality, (TEACHER, START), 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value: float) -> None:
    with pytest.raises(BadRunError, match="iteration 7: student is"):
        refuse_not_finite({"fake": 0.1, "student": value}, 7)


def test_blurring_lowers_sharpness_and_a_plain_picture_has_none() -> None:
    sharp = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    blurred = sharp.reshape(2, 16, 2, 16, 2, 3).mean((2, 4)).repeat(2, 1).repeat(2, 2).astype(np.uint8)
    assert sharpness(sharp) > 2 * sharpness(blurred) > 0
    assert sharpness(np.full((1, 8, 8, 3), 77, np.uint8)) == 0


def test_a_sheet_has_rows_of_eight_pictures(tmp_path: Path) -> None:
    sheet(np.full((10, 4, 6, 3), 200, np.uint8), tmp_path / "samples" / "a.png")
    picture = np.asarray(Image.open(tmp_path / "samples" / "a.png"))
    assert picture.shape == (2 * 4, 8 * 6, 3)
    assert picture[4:, : 2 * 6].min() == 200
    assert picture[4:, 2 * 6 :].max() == 0


@pytest.mark.parametrize("name", ["stable_diffusion", "sd3", "pixart_sigma", "cogvideox_2b"])
def test_samples_are_decoded_as_the_pipeline_decodes_them(name: str, miniatures: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(miniatures(name))
    config = pipeline.vae.config
    if name.startswith("cogvideox"):
        latents = torch.randn(1, 3, 4, 4, 6)
        with torch.no_grad():
            frames = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), output_type="np")
        expected = frames
    else:
        latents = torch.randn(2, 4, 8, 12)
        with torch.no_grad():
            decoded = pipeline.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
        expected = pipeline.image_processor.postprocess(decoded, output_type="np")
    assert np.abs(decode(pipeline, latents).astype(float) - expected * 255).max() <= 0.51


def miniature_run(tmp_path: Path, teacher: Path, **changes: object) -> TdmRecipe:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    small = {"sizes": ("16x16",), "text_length": T5_LENGTH, "iterations": 2, "batch": 1, "accumulation": 1, "rank": 2}
    files = {"teacher": str(teacher), "prompts": str(tmp_path / "prompts.txt")}
    return replace(RECIPES["tdm"], **{**small, **files, "nfe": (1, 2), "sample_every": 1, **changes})


@pytest.mark.slow
def test_a_run_writes_the_same_prompts_at_every_k_and_its_curves(tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    recipe = miniature_run(tmp_path, miniatures("pixart_sigma"), student_lr=0.0, fake_lr=0.0)
    train_tdm(recipe, tmp_path / "run", resume=False)
    sheets = {file.name: file.read_bytes() for file in (tmp_path / "run" / "samples").iterdir()}
    assert sorted(sheets) == ["000001_k1.png", "000001_k2.png", "000002_k1.png", "000002_k2.png"]
    assert sheets["000001_k2.png"] == sheets["000002_k2.png"]  # fixed noise, and a student that has not moved
    assert sheets["000001_k1.png"] != sheets["000001_k2.png"]
    assert list((tmp_path / "run" / "log").rglob("events*"))


@pytest.mark.slow
def test_a_run_whose_student_flies_apart_is_stopped_and_makes_no_student(
    tmp_path: Path, miniatures: Callable[[str], Path]
) -> None:
    recipe = miniature_run(tmp_path, miniatures("pixart_sigma"), weights="full", student_lr=3.0, iterations=6)
    with pytest.raises(BadRunError, match="stopped at iteration"):
        train_tdm(recipe, tmp_path / "run", resume=False)
    assert not (tmp_path / "run" / "student").exists()

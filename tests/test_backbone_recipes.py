"""Every backbone's recipe makes a student of its miniature that load_student opens and that says how it must be run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from export.publish import sampler_tables
from fewstep import app
from tdm_train.checkpoint import Student, load_student
from tdm_train.recipes import RECIPES
from tdm_train.tdm_recipe import TdmRecipe
from tdm_train.texts import prompts_of
from tdm_train.trainer import train_tdm
from tests.miniatures import CLIP_LENGTH, FRAMES, HEIGHT, PROMPTS, T5_LENGTH, WIDTH

SIZE = f"{WIDTH}x{HEIGHT}"
IMAGE = {"sizes": (SIZE,), "text_length": T5_LENGTH}
CLIP = IMAGE | {"text_length": CLIP_LENGTH}
VIDEO = IMAGE | {"frames": FRAMES}
MINIATURES = {
    "pixart_alpha": ("tdm_pixart", IMAGE),
    "pixart_sigma": ("tdm_pixart_demo", IMAGE),
    "stable_diffusion": ("tdm_sd15", CLIP),
    "sdxl": ("tdm_sdxl", CLIP | {"sizes": ("32x32", SIZE)}),
    "sd3": ("tdm_sd3", IMAGE),
    "cogvideox_2b": ("tdm_cogvideox_2b", VIDEO),
    "cogvideox_5b": ("tdm_cogvideox_5b", VIDEO),
}


def in_miniature(name: str, teacher: Path, prompts: Path) -> TdmRecipe:
    """The recipe of a backbone, small enough for its miniature and two iterations."""
    recipe, changes = MINIATURES[name]
    small = {"teacher": str(teacher), "prompts": str(prompts), "iterations": 2, "batch": 2, "accumulation": 1, "rank": 2}
    return replace(RECIPES[recipe], **small, **changes)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    return tmp_path / "prompts.jsonl"


def distilled(recipe: TdmRecipe, out: Path) -> Student:
    train_tdm(recipe, out, resume=False)
    return load_student(out / "student")


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_the_recipe_of_every_backbone_trains_its_miniature_to_a_student_that_opens(
    name: str, tmp_path: Path, prompts: Path, miniatures: Callable[[str], Path]
) -> None:
    recipe = in_miniature(name, miniatures(name), prompts)
    student = distilled(recipe, tmp_path / "run")
    said = student.description
    assert (said.name, said.base, said.revision) == (recipe.name, name, "main")
    assert (said.sizes, said.text_length, said.nfe) == ([SIZE], recipe.text_length, sorted(recipe.nfe))
    assert (said.frames, said.fps) == ((FRAMES, 8) if "cogvideox" in name else (None, None))
    assert said.k_conditioning == (len(recipe.nfe) > 1)
    assert said.training["prompts"] == "prompts.jsonl"
    assert str(tmp_path) not in said.model_dump_json()
    for nfe in said.nfe:
        trained_on = torch.tensor(recipe.grid(nfe))
        whole = trained_on if name == "sd3" else trained_on.floor()
        torch.testing.assert_close(student.grid(nfe), whole, rtol=0, atol=1e-2)


@pytest.mark.slow
def test_the_exporter_evaluates_a_shifted_flows_student_where_it_was_trained(
    tmp_path: Path, prompts: Path, miniatures: Callable[[str], Path]
) -> None:
    student = distilled(in_miniature("sd3", miniatures("sd3"), prompts), tmp_path / "run")
    assert student.description.sigmas == {4: [1.0, 0.75, 0.5, 0.25]}
    assert [row[0] for row in sampler_tables(student)["4"]] == pytest.approx([1000, 900, 750, 500], abs=1e-3)


def test_every_recipe_of_a_backbone_states_the_papers_global_batch() -> None:
    batches = {name: recipe.batch * recipe.accumulation for name, recipe in RECIPES.items() if name.startswith("tdm_")}
    assert [batches[name] for name in ("tdm_pixart", "tdm_sd15", "tdm_sdxl", "tdm_cogvideox_5b")] == [32, 256, 64, 20]


def test_sizes_are_trained_one_after_the_other_and_the_last_is_the_students() -> None:
    recipe = RECIPES["tdm_sdxl"]
    assert [recipe.size_at(step) for step in (0, 999, 1000, 1999)] == ["512x512", "512x512", "1024x1024", "1024x1024"]


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("tdm", ["teacher=FOLDER"], "prompts='', legal: a text file with one prompt per line"),
        ("tdm", ["prompts=FILE"], "teacher='', legal: a diffusers folder, or a hub id"),
        ("tdm_sdxl", ["teacher=FOLDER", "prompts=FILE"], "is a PixArtSigmaPipeline, this recipe is for sdxl"),
        ("tdm", ["teacher=FOLDER", "prompts=FILE", "shift=3.0"], "shift=3.0, legal for epsilon: 1, as only flows are shifted"),
        ("tdm", ["teacher=FOLDER", "prompts=FILE", "targets=('to_z',)"], "has no module 'to_z', legal are for example"),
        ("tdm", ["teacher=FOLDER", "prompts=FILE", "sizes=('30x30',)"], "size 30x30, legal: multiples of 8 pixels"),
        ("tdm", ["sizes=('big',)"], "legal: a tuple of sizes in pixels"),
        ("tdm", ["frames=9"], "frames=9 and fps=0, legal: both above 0 for videos, both 0 for pictures"),
        ("tdm", ["batch=0"], "batch=0, legal: 1 or more"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_a_line(
    recipe: str, changes: list[str], said: str, tmp_path: Path, prompts: Path, miniatures: Callable[[str], Path]
) -> None:
    changes = [change.replace("FOLDER", str(miniatures("pixart_sigma"))).replace("FILE", str(prompts)) for change in changes]
    settings = [argument for change in changes for argument in ("--set", change)]
    result = CliRunner().invoke(app, ["train", recipe, "--out", str(tmp_path / "run"), "--processes", "1", *settings])
    assert result.exit_code == 1
    assert said in result.stderr.splitlines()[-1]
    assert not (tmp_path / "text_cache").exists()  # it was refused before any work


def test_scenes_captions_and_prompt_files_are_both_prompts(prompts: Path) -> None:
    assert prompts_of(TdmRecipe(prompts=str(prompts))) == PROMPTS
    assert len(prompts_of(TdmRecipe(prompts=7))) == 7

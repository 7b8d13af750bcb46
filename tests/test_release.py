"""What a release does not state is asked for, and what it states wrongly is refused by field."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tdm_train.description import first_error
from tdm_train.release import Release
from tdm_train.released import PRESETS, SD3, read_release
from tests.conftest import ROOT


def refusal(name: str, change: dict[str, Any], drop: str | None = None) -> str:
    """What is said of a preset with `change` (dots go down) and without the field `drop`."""
    contents = json.loads(PRESETS[name].model_dump_json())
    for path, value in change.items():
        *parents, field = path.split(".")
        there = contents
        for parent in parents:
            there = there[parent]
        there[field] = value
    if drop:
        *parents, field = drop.split(".")
        del (contents[parents[0]] if parents else contents)[field]
    with pytest.raises(ValidationError) as caught:
        Release.model_validate_json(json.dumps(contents))
    return first_error(caught.value, Release)


@pytest.mark.parametrize("field", ["layout", "pipeline", "network", "sampler", "grid", "guidance_scale", "student"])
def test_a_field_left_out_is_asked_for(field: str) -> None:
    assert refusal("TDM_sd3_lora", {}, field).startswith(f"{field}: Field required")


@pytest.mark.parametrize("field", ["adapter_scale", "nfe", "default_nfe", "text_length", "sizes", "base", "revision"])
def test_what_the_student_needs_has_no_default(field: str) -> None:
    assert refusal("TDM_sd3_lora", {}, f"student.{field}").startswith(f"student.{field}: Field required")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("TDM_sd3_lora", {"surprise": 1}, "surprise"),
        ("TDM_sd3_lora", {"layout": "pickle"}, "layout: Input should be 'diffusers', 'kohya' or 'positional'"),
        ("TDM_sd3_lora", {"pipeline": "FluxPipeline"}, "FluxPipeline is not supported"),
        ("TDM_sd3_lora", {"pipeline": "StableDiffusionXLPipeline"}, "student.family is 'sd3', but"),
        ("TDM_sd3_lora", {"guidance_scale": 4.5}, "guidance_scale"),
        ("TDM_sd3_lora", {"student.adapter_scale": None}, "student.adapter_scale, for example 1.0"),
        ("TDM_sd3_lora", {"student.k_conditioning": True}, "student.k_conditioning = false"),
        (
            "TDM_sd3_lora",
            {"sampler.flow_shft": 6},
            "DPMSolverMultistepScheduler has no field 'flow_shft', legal: algorithm_type",
        ),
        ("TDM_sd3_lora", {"sampler._class_name": "LCMScheduler"}, "_class_name='LCMScheduler', legal: CogVideoXDDIMScheduler"),
        ("TDM_sd3_lora", {"sampler": {}}, "_class_name=None"),
        ("TDM_sd3_lora", {"layout": "positional"}, "positional goes with layout 'positional'"),
        (
            "TDM_sd3-5_lora",
            {"layout": "kohya"},
            "positional goes with layout 'positional' and with no other, got layout 'kohya'",
        ),
        ("TDM_sd3-5_lora", {"positional.rank": 0}, "positional.rank"),
        ("TDM_sd3_lora", {"grid": "timesteps"}, "grid='timesteps', nfe [4] and student.timesteps None do not agree"),
        ("TDM_CogVideoX-2B_LoRA", {"grid": "sampler"}, "grid='sampler', nfe [4] and student.timesteps {4: "),
        (
            "TDM_CogVideoX-2B_LoRA",
            {"student.nfe": [2, 4]},
            "grid='timesteps', nfe [2, 4] and student.timesteps {4: [999.0, 856.0, 665.0, 399.0]} do not agree",
        ),
        ("TDM_CogVideoX-2B_LoRA", {"student.frames": None}, "frames is missing"),
    ],
)
def test_a_wrong_field_is_named(name: str, change: dict[str, Any], said: str) -> None:
    assert said in refusal(name, change)


def test_a_preset_says_all_that_a_file_must() -> None:
    for release in PRESETS.values():
        assert Release.model_validate_json(release.model_dump_json()) == release


def test_the_file_in_the_readme_is_a_release(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "mine.toml").write_text(shown)
    mine, theirs = read_release(str(tmp_path / "mine.toml")).new_sampler(), SD3.new_sampler()
    mine.set_timesteps(4)
    theirs.set_timesteps(4)
    assert mine.sigmas.tolist() == theirs.sigmas.tolist()

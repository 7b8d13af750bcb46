"""The presets run the released students where and how their authors do."""

from pathlib import Path

import pytest
import torch

from export.sampler_table import sampler_table
from tdm_train.released import COGVIDEOX, PRESETS, SD3, read_release


@pytest.mark.parametrize(
    ("name", "timesteps", "sigmas"),
    [
        ("TDM_sd3_lora", [999, 947, 856, 666], [0.9998, 0.9472, 0.8569, 0.6664, 0]),
        ("TDM_sd3-5_lora", [999, 899, 749, 499], [0.9997, 0.8996, 0.7496, 0.4997, 0]),
        ("TDM_dreamshaper_LoRA", [999, 749, 500, 250], None),
    ],
)
def test_a_sampler_evaluates_where_the_authors_do(name: str, timesteps: list[int], sigmas: list[float] | None) -> None:
    sampler = PRESETS[name].new_sampler()
    sampler.set_timesteps(4)
    assert sampler.timesteps.tolist() == timesteps
    if sigmas is not None:
        torch.testing.assert_close(sampler.sigmas, torch.tensor(sigmas), rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_exported_at_its_4_nfe(name: str) -> None:
    student = PRESETS[name].student
    assert (student.nfe, student.default_nfe) == ([4], 4)
    timesteps = (student.timesteps or {}).get(4)
    rows = sampler_table(PRESETS[name].new_sampler(), 4, timesteps=timesteps)
    assert len(rows) == 4
    if timesteps is not None:
        assert [row[0] for row in rows] == timesteps


def test_scale_and_video_are_as_published() -> None:
    assert {name: preset.student.adapter_scale for name, preset in PRESETS.items()} == {
        "TDM_sd3_lora": 0.125,
        "TDM_sd3-5_lora": 1.0,
        "TDM_dreamshaper_LoRA": 1.0,
        "TDM_CogVideoX-2B_LoRA": 1.0,
    }
    assert COGVIDEOX.student.timesteps == {4: [999, 856, 665, 399]}
    assert (COGVIDEOX.student.frames, COGVIDEOX.student.sizes) == (49, ["720x480"])


def test_a_release_is_a_preset_or_a_file(tmp_path: Path) -> None:
    assert read_release("TDM_sd3_lora") is SD3
    with pytest.raises(ValueError, match=r"release 'TDM_sd4', legal: TDM_sd3_lora, .*, or a .toml file of the same fields"):
        read_release("TDM_sd4")
    with pytest.raises(OSError, match=r"none\.toml"):
        read_release(str(tmp_path / "none.toml"))
    for contents, said in (("layout = ", "is not TOML"), ('layout = "x"', "layout: Input should be 'diffusers'")):
        (tmp_path / "mine.toml").write_text(contents)
        with pytest.raises(ValueError, match=said):
            read_release(str(tmp_path / "mine.toml"))

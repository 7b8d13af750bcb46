"""student.json of a student folder says everything that running the student needs, or is refused by field."""

import json
from pathlib import Path
from typing import Any

import pytest

from tdm_train.description import Description, read_description

IMAGE: dict[str, Any] = {
    "format": 2,
    "name": "tiny",
    "family": "sdxl",
    "base": "random",
    "revision": "main",
    "nfe": [1, 2, 4],
    "default_nfe": 4,
    "text_length": 77,
    "sizes": ["48x32", "32x32"],
    "k_conditioning": True,
    "adapter_scale": None,
    "training": {},
}
VIDEO = {**IMAGE, "family": "cogvideox", "frames": 49, "fps": 8}


def write(folder: Path, contents: Any) -> Path:
    (folder / "student.json").write_text(json.dumps(contents))
    return folder


@pytest.mark.parametrize("contents", [IMAGE, VIDEO, {**IMAGE, "timesteps": {"4": [999, 856, 665, 399]}}])
def test_what_is_written_is_read_back(contents: dict[str, Any], tmp_path: Path) -> None:
    described = read_description(write(tmp_path, contents))
    described.write(tmp_path)
    assert read_description(tmp_path) == described
    assert {**contents, **json.loads(described.model_dump_json(exclude_none=True))}.items() >= contents.items()


def test_grids_are_by_whole_numbers_of_nfe(tmp_path: Path) -> None:
    described = read_description(write(tmp_path, {**IMAGE, "sigmas": {"1": [1.0], "2": [1, 0.75]}}))
    assert described.sigmas == {1: [1.0], 2: [1.0, 0.75]}


@pytest.mark.parametrize("field", [name for name in IMAGE if name != "format"])
def test_a_missing_field_is_named_with_an_example(field: str, tmp_path: Path) -> None:
    contents = {name: value for name, value in IMAGE.items() if name != field}
    with pytest.raises(ValueError, match=rf"student.json: {field}: Field required, for example .+"):
        read_description(write(tmp_path, contents))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"guidance": 3}, "guidance: Extra inputs are not permitted"),
        ({"family": "flux"}, "family: Input should be 'pixart', 'stable_diffusion', .*'cogvideox', for example \"pixart\""),
        ({"text_length": "77"}, "text_length: Input should be a valid integer, for example 77"),
        ({"sizes": ["1024"]}, r"sizes.0: String should match pattern .*, for example \[\"1024x1024\"\]"),
        ({"nfe": [4, 1], "default_nfe": 4}, r"nfe must rise and hold default_nfe, got \[4, 1\] and 4"),
        ({"default_nfe": 3}, r"nfe must rise and hold default_nfe, got \[1, 2, 4\] and 3"),
        ({"nfe": [0, 4]}, "nfe.0: Input should be greater than or equal to 1"),
        ({"frames": 49}, r"frames is of videos alone \(family 'sdxl'\)"),
        ({"family": "cogvideox", "frames": 49}, r"fps is missing, for example 8 \(family 'cogvideox'\)"),
        ({"timesteps": {"1": [999]}, "sigmas": {"1": [1]}}, "timesteps and sigmas: give one of them"),
        ({"timesteps": {"3": [999, 500, 1]}}, r"the grid of NFE 3 is .* falling values for one of nfe \[1, 2, 4\]"),
        ({"timesteps": {"2": [400, 999]}}, r"the grid of NFE 2 is \[400.0, 999.0\], legal: 2 falling values"),
        ({"format": 3}, "has format 3, this version reads 1 and 2"),
    ],
)
def test_an_illegal_value_is_named_with_what_is_legal(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_description(write(tmp_path, {**IMAGE, **change}))


def test_a_file_that_is_no_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a student folder"):
        read_description(tmp_path)
    (tmp_path / "student.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_description(tmp_path)
    with pytest.raises(ValueError, match=r"has format \[\]"):
        read_description(write(tmp_path, []))


def test_format_1_still_opens_and_means_the_transformers_own_size(tmp_path: Path) -> None:
    for part, config in {
        "transformer": {"sample_size": 8},
        "vae": {"out_channels": 48, "block_out_channels": [32, 64, 128]},
    }.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    unsaid = ("revision", "sizes", "k_conditioning", "adapter_scale")
    old = {name: value for name, value in IMAGE.items() if name not in unsaid} | {"format": 1, "family": "pixart"}
    described = read_description(write(tmp_path, old))
    assert described == Description(**{**IMAGE, "family": "pixart", "revision": "1", "sizes": ["128x128"]})

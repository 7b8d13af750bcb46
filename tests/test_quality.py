"""`fewstep eval` groups students by how they were taught, and tells every group's mean, spread and picture."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.eval_commands import nfe_counts, numbers
from benchmarks.evaluation import Row
from benchmarks.grid import GAP, cell, draw_grid
from benchmarks.quality import groups_of, names_of, plot, table


def student(folder: Path, **training: object) -> Path:
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "student.json").write_text(json.dumps({"nfe": [1, 4], "training": training}))
    return folder / "student"


def row(what: str, nfe: int, adherence: float, frechet: float, guidance: float = 1.0) -> Row:
    return Row(what, nfe, guidance, adherence, {}, frechet, np.zeros((1, 2, 2, 3), np.uint8))


@pytest.fixture
def three(tmp_path: Path) -> tuple[list[Path], list[list[Row]]]:
    folders = [
        student(tmp_path / "a", seed=1, guidance=2),
        student(tmp_path / "other", seed=1, guidance=3),
        student(tmp_path / "b", seed=2, guidance=2),
    ]
    shares = ((0.6, 0.9, 130), (0.5, 0.8, 150), (0.7, 0.8, 100))
    rows = [
        [row(name, 1, one, far + 20), row(name, 4, four, far)]
        for name, (one, four, far) in zip(names_of(folders), shares, strict=True)
    ]
    return folders, rows


def test_students_that_differ_by_their_seed_alone_are_one_group(three: tuple[list[Path], list[list[Row]]]) -> None:
    same, other = groups_of(*three)
    assert (same.name, same.seeds, other.name, other.seeds) == ("a", (1, 2), "other", (1,))
    assert same.as_json()["rows"] == [
        {"nfe": 1, "adherence": {"mean": 0.65, "stdev": 0.0707}, "frechet": {"mean": 135, "stdev": 21.2132}},
        {"nfe": 4, "adherence": {"mean": 0.85, "stdev": 0.0707}, "frechet": {"mean": 115, "stdev": 21.2132}},
    ]
    assert other.as_json()["rows"][0]["adherence"] == {"mean": 0.5, "stdev": None}
    assert "85.0% +- 7.1%" in table([same, other])
    assert "other" not in table([same, other])


def test_students_whose_folders_have_one_name_are_refused(tmp_path: Path) -> None:
    assert names_of([tmp_path / "model_repository" / "scenes"]) == ["student"]
    with pytest.raises(ValueError, match="their folders must have different names"):
        names_of([tmp_path / "x" / "a" / "student", tmp_path / "y" / "a" / "student"])


def test_the_plot_shows_students_and_teacher(tmp_path: Path, three: tuple[list[Path], list[list[Row]]]) -> None:
    folders, rows = three
    judged = [row("rendered", 0, 0.99, 80), row("teacher", 50, 0.9, 90, 2.0), row("teacher", 8, 0.7, 140, 2.0)]
    plot([*judged, *rows[0], *rows[1], *rows[2]], groups_of(folders, rows), tmp_path / "with.png")
    plot(judged, [], tmp_path / "without.png")
    with Image.open(tmp_path / "with.png") as drawn, Image.open(tmp_path / "without.png") as bare:
        assert drawn.size == bare.size
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > len(bare.convert("RGB").getcolors(1 << 20))


def test_the_grid_shows_pictures_whole_and_frames_of_clips_beside_each_other(tmp_path: Path) -> None:
    clip = np.stack([np.full((8, 8, 3), 16 * frame, np.uint8) for frame in range(16)])
    for pictures, width in ((np.full((3, 8, 8, 3), 80, np.uint8), 8), (np.stack([clip] * 3), 32)):
        rows = [dataclasses.replace(row("rendered", 0, 1, 80), pictures=pictures)] * 2
        draw_grid(rows, ["a red circle"] * 3, tmp_path / "grid.png", lines=2)
        with Image.open(tmp_path / "grid.png") as drawn:
            pixels = np.asarray(drawn.convert("RGB"))
        last = pixels[-(8 + GAP) :, -(width + GAP) :][:8, :width]
        assert np.array_equal(last, cell(pictures[1]))
        assert (pixels[:, : -2 * (width + GAP)] < 128).any(), "captions"


@pytest.mark.parametrize("text", ["", "1,", "a", "-1", "0", "1;2", "nan"])
def test_numbers_that_are_none_are_refused_by_their_option(text: str) -> None:
    with pytest.raises(ValueError, match=r"--guidance .* legal are numbers above 0"):
        numbers("--guidance", text)
    with pytest.raises(ValueError, match="--nfe"):
        nfe_counts(text)
    with pytest.raises(ValueError, match=r"--nfe '1.5': legal are whole numbers"):
        nfe_counts("1.5")

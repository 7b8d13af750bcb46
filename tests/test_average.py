"""The mean of several students' weights is a student folder like theirs, and what has no mean is refused before any work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fewstep import app
from tdm_train.average import average_students
from tdm_train.backbones import backbone_of
from tdm_train.checkpoint import K_VECTORS, load_student, open_pipeline, save_student
from tdm_train.steps_aware import make_steps_aware, timestep_embedding
from tests.test_checkpoint import describe, predict

SEEDS = (4, 5, 6)
Students = list[Path]


@pytest.fixture
def students(miniatures: Callable[[str], Path], tmp_path: Path) -> Students:
    return [student_of(miniatures("pixart_alpha"), tmp_path / str(seed), seed) for seed in SEEDS]


def student_of(teacher: Path, folder: Path, seed: int) -> Path:
    """A student that has strayed from its teacher, by chance."""
    pipeline = open_pipeline(teacher)
    network = getattr(pipeline, backbone_of(pipeline).NETWORK)
    make_steps_aware(network, (1, 4))
    torch.manual_seed(seed)
    torch.nn.init.normal_(timestep_embedding(network)[1].k_embedding)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_student(pipeline, network, describe(pipeline, training={"method": "TDM", "seed": seed}), folder)
    return folder


def rewrite(folder: Path, **fields: Any) -> None:
    file = folder / "student.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def run(*arguments: Path | str) -> Any:
    return CliRunner().invoke(app, ["average", *map(str, arguments)])


def test_every_weight_and_k_vector_is_the_mean_and_all_else_is_as_it_was(students: Students, tmp_path: Path) -> None:
    result = run(*students, "--out", tmp_path / "mean")
    assert result.exit_code == 0, result.stderr
    averaged = []
    for file in sorted(path for path in (tmp_path / "mean").rglob("*") if path.is_file()):
        name = file.relative_to(tmp_path / "mean")
        if str(name) == K_VECTORS or (str(name).startswith("transformer/") and file.suffix == ".safetensors"):
            averaged.append(name)
            found, states = load_file(file), [load_file(student / name) for student in students]
            for key, value in found.items():
                wanted = sum(state[key].double() for state in states) / len(states)
                assert value.dtype == states[0][key].dtype == torch.float16
                assert torch.allclose(value.double(), wanted, rtol=2**-10, atol=1e-7), (name, key)
                assert not torch.equal(value, states[0][key]), (name, key)
        elif str(name) != "student.json":
            assert file.read_bytes() == (students[0] / name).read_bytes(), name
    assert len(averaged) == 2


def test_the_mean_is_a_student_at_every_k(students: Students, tmp_path: Path) -> None:
    average_students(students, tmp_path / "mean")
    mean, singles = load_student(tmp_path / "mean"), [load_student(student) for student in students]
    assert mean.description.training == {"method": "TDM", "averaged_seeds": list(SEEDS)}
    text = backbone_of(mean.pipeline).encode(mean.pipeline, ["a red circle", "a blue square"], mean.description.text_length)
    by_hand = load_student(students[0])
    states = [single.denoiser.network.state_dict() for single in singles]
    by_hand.denoiser.network.load_state_dict({key: sum(state[key] for state in states) / len(states) for key in states[0]})
    for nfe in (1, 4):
        difference = (predict(mean, text, nfe) - predict(by_hand, text, nfe)).abs().max()
        apart = (predict(singles[0], text, nfe) - predict(singles[1], text, nfe)).abs().max()
        assert difference < 0.01 * apart  # float16's rounding


def test_students_of_equal_weights_have_themselves_for_a_mean(students: Students, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(students[0], twin)
    rewrite(twin, training={"method": "TDM", "seed": 99})
    average_students([students[0], twin], tmp_path / "mean")
    for name in (K_VECTORS, "transformer/diffusion_pytorch_model.safetensors"):
        first, mean = load_file(students[0] / name), load_file(tmp_path / "mean" / name)
        assert all(torch.equal(mean[key], first[key]) for key in first)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda folder: rewrite(folder, training={"method": "TDM", "seed": 4}),
            "training seeds 4, 4, 6, legal: different ones",
        ),
        (lambda folder: rewrite(folder, training={"method": "TDM"}), "training seeds 4, None, 6"),
        (lambda folder: rewrite(folder, training={"method": "DMD", "seed": 5}), "differ by more than their training seed"),
        (lambda folder: rewrite(folder, base="another"), "differ by more than their training seed"),
        (lambda folder: rewrite(folder, adapter_scale=1.0), "has an adapter fused in, legal: students of weights=full"),
        (lambda folder: (folder / "odd.txt").write_text("odd"), "are not of the same files: odd.txt"),
        (lambda folder: (folder / "vae" / "config.json").write_text("{}"), "vae/config.json of"),
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks vae"),
        (lambda folder: (folder / "student.json").unlink(), "is not a student folder"),
    ],
)
def test_what_has_no_mean_is_refused_and_nothing_is_written(
    change: Callable[[Path], object], said: str, students: Students, tmp_path: Path
) -> None:
    change(students[1])
    result = run(*students, "--out", tmp_path / "mean")
    assert result.exit_code == 1
    assert said in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(seed) for seed in SEEDS]


def test_one_student_alone_and_a_folder_that_exists_are_refused(students: Students, tmp_path: Path) -> None:
    assert "1 student to average, legal: 2 or more" in run(students[0], "--out", tmp_path / "mean").stderr
    assert "exists already: name another folder" in run(*students, "--out", students[2]).stderr

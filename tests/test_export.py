"""Exported graphs equal PyTorch and diffusers, and what is not proven is not published."""

import dataclasses
import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from PIL import Image
from typer.testing import CliRunner

import export.onnx
import export.publish
from export.comparison import Check, Pictures, Trajectory
from export.graphs import Graph
from export.onnx import halve_weights
from export.publish import ExportRefused, export_student
from export.report import Report, side_by_side
from export.tensorrt import toolchain
from export.verify import compare_graph
from fewstep import app
from server.engine.engine import Engine
from server.engine.request import Request
from server.engine.student import GRAPHS, StudentManifest, open_student
from server.inspect import as_text, inspect
from tdm_train.checkpoint import load_student, open_pipeline, save_student
from tdm_train.recipes import TdmRecipe
from tdm_train.scenes.autoencoder import new_autoencoder
from tdm_train.scenes.teacher import TeacherLoss, new_transformer, save_teacher
from tdm_train.scenes.text_encoder import new_text_encoder, new_tokenizer
from tdm_train.steps_aware import make_steps_aware, timestep_embedding
from tdm_train.student_folder import describe
from tests.conftest import ROOT, start_server


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight student of the bundled student's own classes, made the way training makes one."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    text_encoder = new_text_encoder(len(tokenizer))
    save_teacher(TeacherLoss(new_transformer()), text_encoder, new_autoencoder(), tokenizer, folder / "teacher")
    teacher = open_pipeline(folder / "teacher")
    transformer = teacher.transformer
    make_steps_aware(transformer, (1, 2, 3, 4))
    torch.nn.init.normal_(timestep_embedding(transformer)[1].k_embedding)
    save_student(teacher, transformer, describe(TdmRecipe(), teacher), folder / "student")
    return folder / "student"


@pytest.fixture(scope="module")
def published(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    return export_student(student_folder, tmp_path_factory.mktemp("repository"), tensorrt=toolchain("rtx", "8.9"))


@pytest.mark.slow
def test_every_graph_equals_eager_and_every_k_equals_the_diffusers_pipeline(published: tuple[Path, Report]) -> None:
    checks = {check.what: check for check in published[1].checks}
    assert all(check.passed for check in checks.values())
    assert {f"{nfe} exported steps equal the diffusers pipeline" for nfe in (1, 2, 3, 4)} <= set(checks)
    against_diffusers = [check for check in checks.values() if check.against == "diffusers"]
    assert max(check.error for check in against_diffusers if not check.levels) <= 1e-5
    assert [check.error <= 1 for check in against_diffusers if check.levels] == [True] * 4


@pytest.mark.slow
def test_the_published_folder_is_whole_and_small(published: tuple[Path, Report]) -> None:
    folder, _ = published
    names = {file.name for file in (folder / "1").iterdir()}
    assert {file.name for file in folder.iterdir()} == {"1", "config.pbtxt", "report.json", "report.md", "report.png"}
    assert names == {
        "model.py",
        "student.json",
        "text_encoder.onnx",
        "student_step.onnx",
        "vae_decoder.onnx",
        "tokenizer.json",
        "engines",
    }
    assert "decoupled" in (folder / "config.pbtxt").read_text()
    StudentManifest.model_validate(json.loads((folder / "1" / "student.json").read_text()))
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.suffix != ".plan") < 20e6


@pytest.mark.slow
def test_every_graph_s_engine_is_in_the_table(published: tuple[Path, Report]) -> None:
    head, *rows = published[1].rows()
    cells = [row[head.index("engine")] for row in rows]
    assert len([cell for cell in cells if cell.startswith("fp32, ") and cell.endswith("tensorrt_rtx for 8.9")]) == len(GRAPHS)
    assert cells[0] in (published[0] / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_student_with_its_weights_in_files_of_their_own_makes_the_same_pixels(
    student_folder: Path, published: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.onnx, "ONE_FILE_BYTES", 0)
    folder, report = export_student(student_folder, tmp_path)
    assert all(check.passed for check in report.checks)
    apart, one_file = Engine.open(folder), Engine.open(published[0])
    assert len(apart.manifest.weight_files) == len(GRAPHS)
    assert not one_file.manifest.weight_files
    for file in apart.manifest.weight_files:
        graph = folder / "1" / file.removesuffix(".data")
        assert (folder / "1" / file).stat().st_size > 0.8 * (published[0] / "1" / graph.name).stat().st_size
    request = Request("a red circle", 7, 0, 4, next(iter(apart.manifest.sizes)))
    assert np.array_equal(apart.run(request).image, one_file.run(request).image)
    inspect(folder)


@pytest.mark.slow
def test_no_graph_tells_where_it_was_exported(published: tuple[Path, Report]) -> None:
    for graph in GRAPHS:
        contents = (published[0] / "1" / f"{graph}.onnx").read_bytes()
        assert not re.search(rb"stack_trace|site-packages", contents), graph
        assert str(ROOT).encode() not in contents


def test_k_conditioning_travels_through_folder_and_reload(student_folder: Path) -> None:
    student = load_student(student_folder)
    vectors = timestep_embedding(student.denoiser.network)[1].k_embedding
    assert vectors.shape == (5, 192)
    assert float(vectors.detach().abs().min(1).values.max()) > 0
    assert student.nfe_set == (1, 2, 3, 4)


@pytest.mark.slow
def test_the_report_tells_of_every_check_and_names_the_student_it_is_about(published: tuple[Path, Report]) -> None:
    folder, report = published
    said, page = json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()
    assert said["manifest_sha256"] == open_student(folder).manifest.digest()
    assert [graph["bytes"] for graph in said["graphs"]] == [
        (folder / "1" / f"{graph.name}.onnx").stat().st_size for graph in report.graphs
    ]
    for check in report.checks:
        assert check.what in page
        assert check.what in report.as_text()
        assert check.mean <= check.error
    assert {check["what"]: check["error"] for check in said["checks"]} == {c.what: c.error for c in report.checks}
    with Image.open(folder / "report.png") as picture:  # 4 NFE counts; 2 prompts with 3 pictures of 128 x 128 each
        assert picture.width > 6 * 128
        assert picture.height > 4 * 128


@pytest.mark.slow
def test_inspect_explains_the_published_student_with_its_report(published: tuple[Path, Report]) -> None:
    folder, report = published
    assert f"{len(report.checks)} checks passed at export" in as_text(inspect(folder))


@pytest.mark.slow
def test_triton_serves_a_student_with_a_report(published: tuple[Path, Report]) -> None:
    server = start_server(published[0].parent)
    try:
        body = json.dumps({"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}).encode()
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        request = urllib.request.Request(f"{server.url}/v1/images/generations", body, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.read().startswith(b"\x89PNG")
    finally:
        assert server.stop() == 0


@pytest.mark.slow
def test_a_dry_run_builds_and_proves_but_leaves_the_repository_alone(
    student_folder: Path, published: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def quick_build(student: object, vae: object, folder: Path, precisions: object, engines: object) -> Report:
        folder.mkdir()
        built.append(folder)
        return published[1]

    monkeypatch.setattr(export.publish, "build", quick_build)
    arguments = ["export", str(student_folder), "--to", str(tmp_path / "repository")]
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "nothing was published" in dry.stdout
    assert "student_step equals eager, batch 8" in dry.stdout
    assert not (tmp_path / "repository").exists()
    assert not built[0].exists()
    real = CliRunner().invoke(app, arguments)
    assert real.exit_code == 0, real.output
    assert f"published {tmp_path / 'repository' / 'scenes'}" in " ".join(real.stdout.split())
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["scenes"]


@pytest.mark.slow
@pytest.mark.parametrize("dry_run", [False, True])
def test_nothing_is_published_when_a_check_fails(
    student_folder: Path, published: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "old").write_text("the version before")
    failed = Check("student_step equals eager, batch 1", float("nan"), 1e-4)

    def broken_build(*arguments: object) -> Report:
        return dataclasses.replace(published[1], checks=(failed,))

    monkeypatch.setattr(export.publish, "build", broken_build)
    with pytest.raises(ExportRefused, match="student_step equals eager, batch 1: nan"):
        export_student(student_folder, tmp_path, dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert (tmp_path / "scenes" / "old").read_text() == "the version before"


class Twice(torch.nn.Module):
    """Gives its input twice."""

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return latents, latents


class SecondSpoilt:
    """A session whose second output has a NaN in its last element, and whose first is right."""

    batch_invariant = True

    def run(self, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
        second = tensors["latents"].copy()
        second.reshape(-1)[-1] = np.nan
        return [tensors["latents"], second]


def test_a_nan_in_any_output_fails_every_check() -> None:
    def example(rows: int, latents: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {"latents": torch.randn(rows, *latents)}

    graph = Graph("twice", Twice(), example, ("next_latents", "x0"), {"latents": {0: "batch"}})
    checks = list(compare_graph(graph, SecondSpoilt(), [(3, 4)]))
    assert len(checks) == 5
    assert not any(check.passed for check in checks)


def test_the_picture_shows_a_single_level_of_difference_and_nothing_else() -> None:
    eager = np.full((1, 16, 16, 3), 100, np.uint8)
    exported = eager.copy()
    exported[0, 5, 7] += 1
    latents = np.zeros((1, 4, 2, 2), np.float32)
    picture = np.asarray(side_by_side((Trajectory(4, "", Pictures(latents, exported), Pictures(latents, eager)),)))
    difference = picture[-24:, -24:][:16, :16].astype(int)  # the last tile, left of and above a white margin of 8
    assert (difference[5, 7] >= 64).all()
    difference[5, 7] = 0
    assert not difference.any()


def test_a_folder_that_is_no_student_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a student folder: it has no student\.json"):
        export_student(tmp_path, tmp_path)


def test_weights_are_halved_only_where_half_precision_holds_them_exactly() -> None:
    exact, inexact = np.full(64, 0.5, np.float32), np.full(64, 0.1, np.float32)
    weights = [onnx.numpy_helper.from_array(exact, "exact"), onnx.numpy_helper.from_array(inexact, "inexact")]
    node = onnx.helper.make_node("Add", ["exact", "inexact"], ["sum"])
    output = onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, [64])
    model = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [], [output], weights)))
    halve_weights(model)
    halved = ir.to_proto(model)
    assert {weight.name: weight.data_type for weight in halved.graph.initializer} == {
        "exact.half": onnx.TensorProto.FLOAT16,
        "inexact": onnx.TensorProto.FLOAT,
    }
    onnx.checker.check_model(halved, full_check=True)
    assert np.array_equal(ReferenceEvaluator(halved).run(None, {})[0], exact + inexact)

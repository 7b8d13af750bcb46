"""A student in half precision is proven against eager in the same precision and against itself in float32, or refused."""

import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.bfloat16 import widened
from export.precision import ALL_FP32, in_dtype, in_precision, parse_precisions
from export.publish import ExportRefused, export_student
from export.report import Report
from server.engine.engine import Engine
from server.engine.errors import StudentError
from server.engine.request import Request
from server.engine.student import GRAPHS, STAGES, open_student
from server.inspect import as_text, inspect
from tdm_train.checkpoint import Student, load_student
from tests.conftest import ROOT
from tests.miniatures import save_miniature_student, t5, t5_tokenizer

SMALL = {"nfe": [1, 4], "sizes": ["64x64"]}
Exports = Callable[[str, str], tuple[Path, Report]]


def save_small(name: str, folder: Path) -> Path:
    """A miniature student whose autoencoder may be halved."""
    saved = save_miniature_student(name, folder, **SMALL)
    config = saved / "vae" / "config.json"
    config.write_text(config.read_text().replace('"force_upcast": true', '"force_upcast": false'))
    return saved


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """(miniature, precision) -> its export; each is exported once."""
    made: dict[tuple[str, str], tuple[Path, Report]] = {}

    def export(name: str, told: str) -> tuple[Path, Report]:
        if (name, told) not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name, told] = export_student(
                save_small(name, folder), folder / "repository", precisions=parse_precisions(told)
            )
        return made[name, told]

    return export


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("fp16", {"text_encoder": "fp16", "denoiser": "fp16", "vae": "fp16"}),
        ("denoiser=fp16,vae=fp32", {"text_encoder": "fp32", "denoiser": "fp16", "vae": "fp32"}),
        ("vae=bf16, text_encoder=fp16", {"text_encoder": "fp16", "denoiser": "fp32", "vae": "bf16"}),
    ],
)
def test_a_precision_is_one_word_for_all_stages_or_one_for_each(told: str, expected: dict[str, str]) -> None:
    assert parse_precisions(told) == {graph: expected[stage] for graph, stage in STAGES.items()}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("fp8", "precision 'fp8', legal: fp32, fp16, bf16"),
        ("", "precision '', legal"),
        ("unet=fp16", "stage 'unet', legal stages: text_encoder, denoiser, vae"),
        ("denoiser=half", "precision 'half', legal"),
        ("denoiser", "precision 'denoiser', legal"),
        ("denoiser=fp16,fp32", "stage 'fp32', legal stages"),
        ("vae=fp16,vae=fp32", "stage 'vae' is given twice"),
    ],
)
def test_an_unknown_stage_or_precision_is_refused_by_name(told: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_precisions(told)


def test_an_autoencoder_that_overflows_in_float16_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = save_miniature_student("stable_diffusion", tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"force_upcast=true.*vae=fp32 or vae=bf16"):
        export_student(folder, tmp_path / "repository", precisions=parse_precisions("fp16"))
    assert not (tmp_path / "repository").exists()


def grow_weights(student: Student) -> None:
    """Makes the decoder's values overflow in float16, and in no other precision."""
    with torch.no_grad():
        student.pipeline.vae.decoder.conv_in.weight.mul_(1e7)


def test_a_stage_that_overflows_is_refused_with_the_part_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_small("stable_diffusion", tmp_path)

    def load_grown(path: Path) -> Student:
        student = load_student(path)
        grow_weights(student)
        return student

    monkeypatch.setattr("export.publish.load_student", load_grown)
    with pytest.raises(ValueError, match=r"vae=fp16 is refused: .*decoder\.conv_in.*not finite.*vae=fp32 or vae=bf16"):
        export_student(folder, tmp_path / "repository", precisions=parse_precisions("vae=fp16"))
    assert not list((tmp_path / "repository").iterdir())


def test_t5_keeps_in_float32_what_overflows_in_float16() -> None:
    encoder = t5(t5_tokenizer(), 16)
    halved, rounded = in_dtype(encoder, torch.float16), in_dtype(encoder, torch.bfloat16)
    kept = {name for name, weight in halved.named_parameters() if weight.dtype == torch.float32}
    assert kept == {name for name, _ in encoder.named_parameters() if ".wo." in name}
    assert {weight.dtype for weight in rounded.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


def test_stages_that_have_their_precision_are_shared_and_the_given_student_stays_as_it_is(tmp_path: Path) -> None:
    student = load_student(save_small("stable_diffusion", tmp_path))
    vae = student.pipeline.vae
    cast, decoder = in_precision(student, vae, ALL_FP32 | {"student_step": "bf16"})
    assert cast.pipeline.text_encoder is student.pipeline.text_encoder
    assert decoder is vae
    assert cast.denoiser.network is cast.pipeline.unet
    assert (cast.pipeline.unet.dtype, student.pipeline.unet.dtype) == (torch.bfloat16, torch.float32)


def test_a_widened_graph_holds_the_same_values_and_no_bfloat16() -> None:
    weight = helper.make_tensor("weight", TensorProto.BFLOAT16, [3], [1.5, -0.0078125, 3.0e38])
    constant = helper.make_node("Constant", [], ["one"], value=helper.make_tensor("", TensorProto.BFLOAT16, [1], [0.3]))
    nodes = [
        helper.make_node("Cast", ["x"], ["rounded"], to=TensorProto.BFLOAT16),
        constant,
        helper.make_node("Mul", ["rounded", "weight"], ["product"]),
        helper.make_node("Add", ["product", "one"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "y")]
    before = numpy_helper.to_array(weight).astype(np.float32)
    model = widened(helper.make_model(helper.make_graph(nodes, "graph", ends[:1], ends[1:], [weight])))
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(numpy_helper.to_array(model.graph.initializer[0]), before)
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT
    assert [node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"] == [TensorProto.FLOAT] * 2


HALF = [("stable_diffusion", "fp16"), ("pixart_sigma", "bf16")]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "told"), HALF)
def test_half_precision_is_proven_against_both_precisions_graph_by_graph_and_end_to_end(
    name: str, told: str, exported: Exports
) -> None:
    folder, report = exported(name, told)
    assert all(check.passed for check in report.checks)
    assert set(open_student(folder).manifest.precision.values()) == {told}
    for graph in GRAPHS:
        kinds = {check.against for check in report.checks if check.graph == graph}
        assert kinds == {"eager", "float32", "itself"}
    whole = {check.what: check for check in report.checks if check.graph is None}
    for nfe in SMALL["nfe"]:
        assert whole[f"{nfe} steps in {told} against float32"].error > 0
        assert f"{nfe} exported steps equal the diffusers pipeline, decoded" in whole
        assert f"{nfe} steps in {told} against float32, decoded" in whole


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "told"), HALF)
def test_only_the_inside_of_a_graph_is_in_half_precision(name: str, told: str, exported: Exports) -> None:
    version = exported(name, told)[0] / "1"
    half = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[told]
    for graph in GRAPHS:
        model = onnx.load(version / f"{graph}.onnx").graph
        ends = [value.type.tensor_type.elem_type for value in (*model.input, *model.output)]
        assert set(ends) <= {TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8}
        assert half in {weight.data_type for weight in model.initializer}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_float16_student_makes_pictures_on_cpu_and_a_bfloat16_one_is_refused_there(exported: Exports) -> None:
    engine = Engine.open(exported(*HALF[0])[0])
    assert engine.run(Request("a red circle", 7, 0, 4, "64x64")).image.shape == (64, 64, 3)
    assert "student_step fp16" in engine.fingerprint_parts["precision"]
    with pytest.raises(StudentError, match=r"bf16, which onnxruntime's CPUExecutionProvider.*TensorRT or CUDA.*--precision"):
        Engine.open(exported(*HALF[1])[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bfloat16_student_is_explained_where_it_cannot_run(exported: Exports) -> None:
    inspection = inspect(exported(*HALF[1])[0])
    assert inspection.fingerprint is None
    assert "this student is for TensorRT or CUDA" in as_text(inspection)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_report_of_a_bfloat16_student_says_how_it_was_proven(exported: Exports) -> None:
    page = (exported(*HALF[1])[0] / "report.md").read_text()
    assert "onnxruntime computes no bfloat16 on CPU" in page
    assert "eager student_step in bf16 against eager float32" in page
    assert "0.16 of the largest value and 11 levels" in page


# --- what the file system refuses ---------------------------------------------------------------------------------------------


def test_a_repository_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_small("stable_diffusion", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportRefused, match=r"nothing was published, .*file/repository cannot be written: Not a directory"):
        export_student(folder, tmp_path / "file" / "repository")


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line_and_nothing_is_published(tmp_path: Path) -> None:
    folder, repository = save_small("stable_diffusion", tmp_path), tmp_path / "repository"
    command = [sys.executable, str(ROOT / "fewstep.py"), "export", str(folder), "--to", str(repository)]
    ended = subprocess.run(command, preexec_fn=files_stay_small, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1
    said = ended.stderr.splitlines()[-1]
    assert re.fullmatch(r"fewstep: nothing was published, .*repository cannot be written: File too large; make room.*", said)
    assert not list(repository.iterdir())


def files_stay_small() -> None:
    """As on a full disk, writing fails beyond 16 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))

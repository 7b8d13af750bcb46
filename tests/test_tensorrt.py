"""Engines are really built here, by TensorRT for RTX, which needs no GPU; that they run, only a GPU can show."""

import copy
import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

import export.publish
from export.families import FAMILIES as FAMILY_EXPORTS
from export.precision import parse_precisions
from export.publish import export_graphs, forms_of, latent_shapes
from export.report import GraphFile, Report
from export.tensorrt import Built, Toolchain, as_text, build_engines, profile_of, recipe_of, toolchain
from export.tensorrt_network import build_plan, bytes_last, text_shapes
from fewstep import app
from server.engine.engine_plan import FOLDER, MANIFEST, RTX_TARGETS, EngineManifest, read_engines
from server.engine.session import PROVIDER, open_graph
from server.engine.student import GRAPHS, NEXT, StudentManifest, read_manifest, sha256_of
from tdm_train.checkpoint import Student, load_student
from tests.conftest import ROOT
from tests.miniatures import MINIATURES, save_miniature_student
from tests.test_imports import loaded_after
from tests.tiny_student import build_tiny_student, tiny_manifest, write_manifest

FAMILIES = [name for name in MINIATURES if name != "pixart_alpha"]  # whose network is pixart_sigma's
AMPERE = "8.6"


@dataclass(frozen=True)
class Half:
    """A family's student, and its graphs in half precision."""

    manifest: StudentManifest
    graphs: dict[str, onnx.ModelProto]


@pytest.fixture(scope="module", params=FAMILIES)
def fp16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Half:
    folder = tmp_path_factory.mktemp(request.param)
    student = load_student(save_miniature_student(request.param, folder))
    precisions = parse_precisions("fp16")
    export_graphs(forms_of(student, student.pipeline.vae, precisions).exported, folder, precisions)
    manifest = manifest_of(student, latent_shapes(student))
    return Half(manifest, {graph: onnx.load(folder / f"{graph}.onnx") for graph in manifest.graphs})


def in_bfloat16(half: Half) -> Half:
    """The same graphs in bfloat16: tracing `module.bfloat16()` gives these nodes, and takes as long again."""
    graphs = {}
    for name, traced in half.graphs.items():
        model = onnx.ModelProto()
        model.CopyFrom(traced)
        values = [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
        for tensor in (*model.graph.initializer, *values):
            if tensor.data_type == TensorProto.FLOAT16:
                array = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        for cast in (attribute for node in model.graph.node for attribute in node.attribute if attribute.name == "to"):
            cast.i = TensorProto.BFLOAT16 if cast.i == TensorProto.FLOAT16 else cast.i
        for value in (*model.graph.input, *model.graph.output):
            kind = value.type.tensor_type
            kind.elem_type = TensorProto.BFLOAT16 if kind.elem_type == TensorProto.FLOAT16 else kind.elem_type
        del model.graph.value_info[:]
        graphs[name] = model
    return Half(half.manifest, graphs)


def manifest_of(student: Student, sizes: dict[str, tuple[int, ...]]) -> StudentManifest:
    """What an export says of the student's shapes; the rest is another student's."""
    family, described = FAMILY_EXPORTS[student.description.family], student.description
    said = read_manifest(ROOT / "model_repository/scenes/1/student.json").model_dump(mode="json")
    said |= {"sizes": {size: list(shape) for size, shape in sizes.items()}, "max_batch": 4}
    said |= {"frames": described.frames, "fps": described.fps, "media_type": "video" if described.frames else "image"}
    said |= {"chunks": [3, 2] if described.frames else None}
    graphs = [*GRAPHS, NEXT] if described.frames else GRAPHS
    tokenizers = family.tokenizers(student)
    said |= {"precision": dict.fromkeys(graphs, "fp16")}
    digests = {f"{graph}.onnx": "0" * 64 for graph in graphs} | {tokenizer.file: "0" * 64 for tokenizer in tokenizers}
    said |= {"tokenizers": [tokenizer.model_dump() for tokenizer in tokenizers], "files": digests}
    return StudentManifest.model_validate(said | {"conditions": list(family.conditions)})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_graph_of_every_family_builds_in_half_precision_for_all_gpus_that_have_it(fp16: Half, precision: str) -> None:
    half, tools = fp16 if precision == "fp16" else in_bfloat16(fp16), toolchain("rtx")  # not 7.5: T5 keeps a layer in float32
    trt = importlib.import_module(tools.package)
    text: dict[str, tuple[int, ...]] = {}
    for graph, model in half.graphs.items():
        recipe = recipe_of(half.manifest, graph, tools, model, text)
        plan, built_in = build_plan(trt, recipe, copy.deepcopy(model), Path(f"{graph}.onnx"))
        assert built_in == precision, graph
        assert len(plan) > 10_000
        text = text or text_shapes(model, recipe.usual)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Built]]:
    folder = build_tiny_student(tmp_path_factory.mktemp("repository"))
    return folder, build_engines(folder, toolchain("rtx", AMPERE))


@pytest.fixture
def tiny(built_once: tuple[Path, list[Built]], tmp_path: Path) -> Path:
    """The tiny student with its engines, as a test's own."""
    return Path(shutil.copytree(built_once[0], tmp_path / "tiny"))


def engines(folder: Path) -> EngineManifest:
    return read_engines(folder / "1", read_manifest(folder / "1" / "student.json"))


def test_the_manifest_tells_of_every_engine_what_it_is_and_was_made_of(built_once: tuple[Path, list[Built]]) -> None:
    folder, built = built_once
    student = read_manifest(folder / "1" / "student.json")
    plans = engines(folder).engines
    assert plans == tuple(one.plan for one in built)
    assert [plan.recipe.graph for plan in plans] == list(GRAPHS)
    for plan in plans:
        contents = (folder / "1" / FOLDER / plan.file).read_bytes()
        assert (plan.sha256, plan.bytes) == (sha256_of(contents), len(contents))
        assert plan.recipe.onnx_sha256 == student.files[f"{plan.recipe.graph}.onnx"]
        assert plan.recipe.targets == (AMPERE,)
        assert plan.recipe.version == importlib.import_module("tensorrt_rtx").__version__
    assert len(list((folder / "1" / FOLDER).iterdir())) == len(plans) + 1
    assert all(plan.recipe.graph in as_text(built) for plan in plans)


def test_profiles_span_every_size_and_batch_and_are_tuned_for_strict(built_once: tuple[Path, list[Built]]) -> None:
    text, step, decoder = (plan.recipe.profile for plan in engines(built_once[0]).engines)
    assert (text["tokens"].min, text["tokens"].opt, text["tokens"].max) == ((1, 12),) * 3
    assert (step["latents"].min, step["latents"].opt, step["latents"].max) == ((1, 4, 4, 8), (16, 4, 8, 8), (16, 4, 8, 8))
    assert step["text_emb"].max == (16, 12, 6)
    assert step["coefficients"].max == (16, 3)
    assert (decoder["latents"].min, decoder["latents"].opt, decoder["latents"].max) == (
        (1, 4, 4, 8),
        (1, 4, 8, 8),
        (4, 4, 8, 8),
    )


def test_an_engine_of_the_same_graph_and_settings_is_kept_to_the_byte(tiny: Path) -> None:
    before = {path.name: path.read_bytes() for path in (tiny / "1" / FOLDER).glob("*.plan")}
    again = build_engines(tiny, toolchain("rtx", AMPERE))
    assert [one.seconds for one in again] == [None] * 3  # and building again would have given other bytes
    assert {path.name: path.read_bytes() for path in (tiny / "1" / FOLDER).glob("*.plan")} == before


def test_engines_are_found_in_the_student_that_is_there_when_it_is_exported_again(tiny: Path, tmp_path: Path) -> None:
    new = build_tiny_student(tmp_path / "new")
    assert [one.seconds for one in build_engines(new, toolchain("rtx", AMPERE), tiny)] == [None] * 3
    assert engines(new) == engines(tiny)


def test_other_targets_stand_beside_those_there_and_the_same_take_their_place(tiny: Path) -> None:
    build_engines(tiny, toolchain("rtx", "8.9"))
    held = [(plan.recipe.graph, plan.recipe.targets) for plan in engines(tiny).engines]
    assert sorted(held) == sorted((graph, (target,)) for graph in GRAPHS for target in (AMPERE, "8.9"))
    older = [
        plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"version": "1.0"})}) for plan in engines(tiny).engines
    ]
    folder = tiny / "1" / FOLDER
    for new, old in zip(older, engines(tiny).engines, strict=True):
        (folder / old.file).rename(folder / new.recipe.file)
    renamed = [plan.model_copy(update={"file": plan.recipe.file}) for plan in older]
    (folder / MANIFEST).write_text(EngineManifest(format=1, engines=tuple(renamed)).model_dump_json())
    assert all(one.seconds is not None for one in build_engines(tiny, toolchain("rtx", AMPERE)))
    versions = {plan.recipe.targets: plan.recipe.version for plan in engines(tiny).engines}
    assert versions == {(AMPERE,): toolchain("rtx").version, ("8.9",): "1.0"}


@pytest.mark.parametrize("damage", ["plan", "manifest"])
def test_a_damaged_engine_is_built_again(tiny: Path, damage: str) -> None:
    folder = tiny / "1" / FOLDER
    path = next(folder.glob("student_step.*")) if damage == "plan" else folder / MANIFEST
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    built = build_engines(tiny, toolchain("rtx", AMPERE))
    renewed = [one.plan.recipe.graph for one in built if one.seconds is not None]
    assert renewed == (["student_step"] if damage == "plan" else list(GRAPHS))
    assert len(engines(tiny).engines) == 3


def refused_decoder(folder: Path) -> None:
    """Puts a decoder in place whose image is uint8 in the middle of the graph, which TensorRT does not have."""
    nodes = [
        helper.make_node("Cast", ["latents"], ["bytes"], name="to_bytes", to=TensorProto.UINT8),
        helper.make_node("Neg", ["bytes"], ["image"], name="negative"),
    ]
    shape = ["B", 4, "h", "w"]
    values = [
        helper.make_tensor_value_info("latents", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("image", TensorProto.UINT8, shape),
    ]
    graph = helper.make_graph(nodes, "decoder", values[:1], values[1:])
    path = folder / "1" / "vae_decoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    write_manifest(folder, tiny_manifest(folder / "1", "tiny"))


def test_a_graph_that_tensorrt_cannot_read_is_one_line_with_node_shapes_and_way_out(tiny: Path) -> None:
    refused_decoder(tiny)
    before = sorted(path.name for path in (tiny / "1").rglob("*"))
    result = run("engines", str(tiny), "--target", AMPERE)
    assert result.exit_code == 1
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith("fewstep: vae_decoder.onnx: tensorrt_rtx")
    for part in (f"for {AMPERE}", "node to_bytes (Cast of latents float [1, 4, 8, 8])", "UINT8", "--provider cuda"):
        assert part in said
    assert sorted(path.name for path in (tiny / "1").rglob("*")) == before


def test_a_gpu_that_lacks_a_kernel_is_one_line_with_the_way_out(tiny: Path) -> None:
    with pytest.raises(
        ValueError, match=r"student_step\.onnx: tensorrt_rtx .* for 7\.5: .*FP32 GEMM.*leave out that GPU with --target"
    ):
        build_engines(tiny, toolchain("rtx", "7.5"))
    assert {plan.recipe.targets for plan in engines(tiny).engines} == {(AMPERE,)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "9.0"], "--target '9.0': tensorrt_rtx"),
        (["--target", "8.6,"], "--target ''"),
        (["--target", "eight"], "builds for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1; others need --tensorrt full on such a GPU"),
        (["--tensorrt", "half"], "--tensorrt 'half': legal are auto, rtx, full"),
    ],
)
def test_what_cannot_be_built_for_is_refused_by_name(tiny: Path, arguments: list[str], said: str) -> None:
    result = run("engines", str(tiny), *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_package_that_is_not_installed_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.tensorrt.installed_packages", dict)
    with pytest.raises(ValueError, match=r"^tensorrt not installed: run `pip install tensorrt`$"):
        toolchain("full")
    with pytest.raises(ValueError, match=r"tensorrt_rtx and tensorrt not installed: run `pip install 'fewstep\[tensorrt\]'"):
        toolchain()


def test_building_engines_loads_no_torch(tiny: Path) -> None:
    code = f"""
from pathlib import Path
from export.tensorrt import build_engines, toolchain
build_engines(Path({str(tiny)!r}), toolchain("rtx", {AMPERE!r}))"""
    assert not loaded_after(code) & {"torch", "diffusers", "transformers"}


def test_a_cast_to_bytes_comes_last_and_the_picture_stays_the_same() -> None:
    nodes = [
        helper.make_node("Cast", ["latents"], ["bytes"], to=TensorProto.UINT8),
        helper.make_node("Transpose", ["bytes"], ["image"], perm=[0, 2, 3, 1]),
    ]
    values = [helper.make_tensor_value_info("latents", TensorProto.FLOAT, [2, 3, 4, 5])]
    values += [helper.make_tensor_value_info("image", TensorProto.UINT8, [2, 4, 5, 3])]
    graph = helper.make_graph(nodes, "decoder", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    latents = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    (before,) = open_graph("decoder", model.SerializeToString(), None, [PROVIDER]).run(None, {"latents": latents})
    moved = bytes_last(model)
    onnx.checker.check_model(moved)
    assert [node.op_type for node in moved.graph.node] == ["Transpose", "Cast"]
    (after,) = open_graph("decoder", moved.SerializeToString(), None, [PROVIDER]).run(None, {"latents": latents})
    assert np.array_equal(before, after)


def test_a_profile_follows_the_graph_s_own_dimensions(tiny: Path) -> None:
    manifest = read_manifest(tiny / "1" / "student.json")
    model = onnx.load(tiny / "1" / "student_step.onnx")
    text = {"text_emb": (1, 7, 6), "mask": (1, 7)}
    profile = profile_of(manifest, "student_step", model, text)
    assert profile["text_emb"].opt == (16, 7, 6)
    assert profile["timestep"].min == (1,)


def test_an_export_builds_engines_before_it_publishes_and_tells_them_in_its_table(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the tracing of a student, which tests/test_export.py does."""
    manifest = read_manifest(tiny / "1" / "student.json")

    def quick_build(student: object, vae: object, folder: Path, precisions: object, engines: Any) -> Report:
        build_tiny_student(folder.parent, folder.name)
        cells = {built.plan.recipe.graph: built.in_words() for built in engines()}
        files = tuple(GraphFile(graph, "fp32", 1, 1.0, cells[graph]) for graph in GRAPHS)
        return Report(manifest, files, (), 1.0)

    student = SimpleNamespace(description=SimpleNamespace(name="tiny"), pipeline=SimpleNamespace(vae=None))
    monkeypatch.setattr(export.publish, "load_student", lambda _: student)
    monkeypatch.setattr(export.publish, "build", quick_build)
    monkeypatch.setattr(Report, "as_text", lambda self: "\n".join(graph.engine or "none" for graph in self.graphs))
    result = run("export", "student", "--to", str(tmp_path), "--tensorrt", "rtx", "--target", AMPERE)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(f"tensorrt_rtx for {AMPERE}") == 3
    assert len(engines(tmp_path / "tiny").engines) == 3
    lonely = run("export", "student", "--to", str(tmp_path), "--target", AMPERE)
    assert "say --tensorrt rtx as well" in lonely.stderr


def test_inspect_shows_engines_and_the_gpus_that_they_fit(tiny: Path) -> None:
    result = run("inspect", str(tiny))
    assert result.exit_code == 0, result.stderr
    assert f"these are GPUs such as {AMPERE} (A10, A40, RTX 30)" in result.stdout
    assert result.stdout.count("tensorrt_rtx") == 3


@pytest.mark.parametrize("damage", ["plan", "unknown", "missing"])
def test_inspect_refuses_an_engine_that_no_digest_vouches_for(tiny: Path, damage: str) -> None:
    path = next((tiny / "1" / FOLDER).glob("vae_decoder.*"))
    if damage == "plan":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        path = path.with_name("other.plan")
        path.write_bytes(b"anything")
    result = run("inspect", str(tiny))
    assert result.exit_code == 1
    assert str(path) in result.stderr
    assert result.stderr.count("\n") == 1


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_toolchain_s_targets_are_in_order_and_without_the_one_that_has_no_float32() -> None:
    assert toolchain("rtx").targets == RTX_TARGETS[1:]
    assert toolchain("rtx", "12.0, 8.6,8.6") == Toolchain("tensorrt_rtx", toolchain().version, ("8.6", "12.0"))

"""What runs a student is chosen by one word, and whatever it lacks is told in one line before anything is loaded."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fewstep import app
from server.engine.engine import Engine
from server.engine.engine_plan import FOLDER, MANIFEST, EngineManifest, EnginePlan, Recipe, ShapeRange
from server.engine.errors import EngineError, StudentError
from server.engine.provider import VARIABLE, batches, provider_asked_for
from server.engine.request import Request
from server.engine.shapes import input_shapes, most_rows
from server.engine.student import GRAPHS, open_student
from tests.fakes import FakeRuntime
from tests.tiny_video import build_tiny_video

PACKAGES = {"tensorrt_rtx": "1.7.1"}
DECLARED: dict[str, tuple[int, ...]] = {
    "tokens": (-1, -1),
    "mask": (-1, -1),
    "latents": (-1, 4, -1, -1),
    "x0_prev": (-1, 4, -1, -1),
    "timestep": (-1,),
    "coefficients": (-1, 3),
    "nfe": (-1,),
    "text_emb": (-1, -1, 6),
}


def add_engines(folder: Path, **changes: Any) -> None:
    """Engines for FakeRuntime, which takes the graphs themselves for plans."""
    student = open_student(folder)
    (folder / "1" / FOLDER).mkdir()
    plans = []
    for graph in GRAPHS:
        dims = {name: DECLARED[name] for name in student.manifest.tensors(graph).inputs}
        rows, text = most_rows(graph, student.manifest), {"text_emb": (1, 12, 6), "mask": (1, 12)}
        least = input_shapes(dims, student.manifest, "64x32", 1, text)
        most = input_shapes(dims, student.manifest, "64x64", rows, text)
        recipe = Recipe(
            **{
                "graph": graph,
                "onnx_sha256": student.manifest.files[f"{graph}.onnx"],
                "package": "tensorrt_rtx",
                "version": "1.7.1",
                "targets": ("8.9",),
                "profile": {name: ShapeRange(min=least[name], opt=most[name], max=most[name]) for name in dims},
            }
            | changes
        )
        contents = student.files[f"{graph}.onnx"]
        (folder / "1" / FOLDER / recipe.file).write_bytes(contents)
        digest = hashlib.sha256(contents).hexdigest()
        plans.append(EnginePlan(recipe=recipe, precision="fp32", file=recipe.file, bytes=len(contents), sha256=digest))
    (folder / "1" / FOLDER / MANIFEST).write_text(EngineManifest(format=1, engines=tuple(plans)).model_dump_json())


@pytest.fixture
def tiny(own_repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("server.engine.provider.installed_packages", lambda: dict(PACKAGES))
    return own_repository / "tiny"


def on_tensorrt(folder: Path, runtime: FakeRuntime) -> Engine:
    return Engine.of(open_student(folder), "strict", "tensorrt", runtime)


def test_engines_that_fit_are_loaded_and_give_the_processor_s_pixels(tiny: Path) -> None:
    add_engines(tiny)
    runtime = FakeRuntime()
    engine, asked = on_tensorrt(tiny, runtime), Request("a red circle", 7, 0, 4, "64x64")
    assert np.array_equal(engine.run(asked).image, Engine.open(tiny, provider="cpu").run(asked).image)
    assert runtime.captured == 5  # one NFE and one decode for each of 2 sizes, and one prompt


def test_the_fingerprint_names_engines_package_and_gpu(tiny: Path) -> None:
    add_engines(tiny)
    parts = on_tensorrt(tiny, FakeRuntime()).fingerprint_parts
    assert parts["provider"] == "TensorRT"
    assert parts["package"] == "tensorrt_rtx 1.7.1"
    assert parts["device"] == "Fake, compute capability 8.9"
    assert parts["batch_policy"] == "fixed 16"
    assert len(parts["engines"]) == 16
    assert "onnxruntime" not in parts


class Untouched(FakeRuntime):
    """A device on which nothing may be loaded."""

    def load_plan(self, graph: str, plan: bytes, package: str) -> Any:
        raise AssertionError("loaded before it was checked")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ("8.6",)}, r"built for 8\.6 with tensorrt_rtx 1\.7\.1; this GPU is 8\.9"),
        ({"version": "1.7.0"}, r"built for 8\.9 with tensorrt_rtx 1\.7\.0; this GPU is 8\.9, with tensorrt_rtx 1\.7\.1"),
        ({"package": "tensorrt"}, r"with tensorrt 1\.7\.1; this GPU is 8\.9"),
        ({"onnx_sha256": "0" * 64}, r"was built from another text_encoder\.onnx"),
    ],
)
def test_engines_that_do_not_fit_are_refused_before_one_is_loaded(tiny: Path, changes: dict[str, Any], said: str) -> None:
    add_engines(tiny, **changes)
    with pytest.raises(StudentError, match=said):
        on_tensorrt(tiny, Untouched())


def test_a_plan_that_was_tampered_with_is_refused_before_one_is_loaded(tiny: Path) -> None:
    add_engines(tiny)
    path = next((tiny / "1" / FOLDER).glob("vae_decoder.*"))
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(StudentError, match=r"vae_decoder\.\S+\.plan: sha256 is"):
        on_tensorrt(tiny, Untouched())


def test_an_engine_of_fewer_rows_than_may_come_is_refused_before_one_is_loaded(tiny: Path) -> None:
    student = open_student(tiny)
    add_engines(tiny, profile={"latents": ShapeRange(min=(1, 4, 4, 8), opt=(1, 4, 8, 8), max=(1, 4, 8, 8))})
    with pytest.raises(StudentError, match=rf"latents may be \[{student.manifest.max_batch}, 4, 8, 8\], and the engine takes"):
        on_tensorrt(tiny, Untouched())


class Full(FakeRuntime):
    """A device without memory."""

    def allocate(self, size: int) -> int:
        raise EngineError("cudaMalloc: cudaErrorMemoryAllocation")


def test_a_gpu_without_room_is_told_with_the_student_and_its_rows(tiny: Path) -> None:
    add_engines(tiny)
    said = r"tiny cannot be made ready for 16 rows on cuda:0, Fake: cudaMalloc: cudaErrorMemoryAllocation"
    with pytest.raises(StudentError, match=said):
        on_tensorrt(tiny, Full())


def test_a_student_without_engines_is_told_how_to_get_them(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudentError, match=r"holds no TensorRT engine of text_encoder; run fewstep engines \S+/tiny"):
        on_tensorrt(tiny, Untouched())
    monkeypatch.setattr("server.engine.provider.installed_packages", dict)
    with pytest.raises(StudentError, match=r"TensorRT is not installed; run `pip install 'fewstep\[tensorrt\]'`"):
        on_tensorrt(tiny, Untouched())


def test_strict_runs_one_batch_and_fast_every_one_up_to_the_most(tiny: Path) -> None:
    manifest = open_student(tiny).manifest
    assert [batches(graph, manifest, strict=True) for graph in GRAPHS] == [[1], [16], [1]]
    assert [len(batches(graph, manifest, strict=False)) for graph in GRAPHS] == [1, 16, 4]


def test_the_provider_is_read_from_the_environment_and_the_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert provider_asked_for() == "cpu"
    monkeypatch.setenv(VARIABLE, "tensorrt")
    assert provider_asked_for() == "tensorrt"
    monkeypatch.setenv(VARIABLE, "gpu")
    with pytest.raises(StudentError, match=r"\$FEWSTEP_PROVIDER must be one of cpu, cuda, tensorrt, got 'gpu'"):
        provider_asked_for()


def gpu_here() -> bool:
    return Path("/dev/nvidiactl").exists()


@pytest.mark.skipif(gpu_here(), reason="a GPU is here, so nothing is refused")
@pytest.mark.parametrize(
    ("backend", "provider"),
    [("inprocess", "cuda"), ("inprocess", "tensorrt"), pytest.param("triton", "tensorrt", marks=pytest.mark.slow)],
)
def test_without_a_gpu_its_providers_are_refused_in_one_line(
    tiny_repository: Path, monkeypatch: pytest.MonkeyPatch, backend: str, provider: str
) -> None:
    for variable in ("FEWSTEP_CPU_THREADS", VARIABLE):  # which serving in process writes
        monkeypatch.setenv(variable, "")
    flags = ["--model-repository", str(tiny_repository), "--backend", backend, "--port", "0", "--provider", provider]
    result = CliRunner().invoke(app, ["serve", *flags])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "no NVIDIA GPU can be used here" in line
    assert line.endswith("choose the provider cpu")


@pytest.mark.parametrize("strict", [True, False])
def test_a_video_on_a_gpu_has_the_processor_s_pixels_and_its_state_stays_there(tmp_path: Path, strict: bool) -> None:
    student = open_student(build_tiny_video(tmp_path))
    runtime = FakeRuntime()
    engine = Engine.of(student, "strict" if strict else "fast", "cuda", runtime)
    request = Request("a", 7, 0, 2, "64x32")
    runtime.bus.clear()
    assert np.array_equal(engine.run(request).image, Engine.of(student, provider="cpu").run(request).image)
    latents = [4 * math.prod((frames, 4, 4, 8)) for frames in (3, 2, 2)]
    pixels = [math.prod((frames, 32, 64, 3)) for frames in (9, 8, 8)]
    decode = [copied for pair in zip(latents, pixels, strict=True) for copied in pair]
    assert [size for _, size in runtime.bus[-6:]] == decode, "latents in and pixels out, and nothing else"

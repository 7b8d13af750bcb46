"""TensorRT engines of an exported student, in its folder. Built by `tensorrt` or `tensorrt_rtx`, whichever is there.

TensorRT for RTX builds for GPUs that are not here, but for no data centre's Hopper or Blackwell; the full TensorRT builds for
the one GPU at hand. An engine that was built before from the same graph, by the same package and settings, is kept.
"""

import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from tqdm import tqdm

from export.exchange import put_in_place
from export.onnx_shapes import declared
from export.tensorrt_network import build_plan, text_shapes
from server.engine.engine_plan import (
    FOLDER,
    MANIFEST,
    RTX_TARGETS,
    EngineManifest,
    EnginePlan,
    Package,
    Recipe,
    ShapeRange,
    graph_digest,
    graph_files,
    read_engines,
    read_plan,
)
from server.engine.errors import StudentError
from server.engine.shapes import Shape, input_shapes, most_rows
from server.engine.student import GraphName, StudentManifest, open_verified, read_manifest, sha256_of
from server.engine.tensorrt_program import installed_packages
from server.table import aligned, readable_size

PACKAGES: dict[str, Package] = {"rtx": "tensorrt_rtx", "full": "tensorrt"}
# 7.5 only when asked for: TensorRT has neither float32 nor bfloat16 matrix products there, and tells so by node.
USUAL_TARGETS = tuple(target for target in RTX_TARGETS if target != "7.5")
Known = dict[str, tuple[EnginePlan, Path]]  # by the recipe's key


@dataclass(frozen=True)
class Toolchain:
    """A TensorRT package, and the compute capabilities to build for."""

    package: Package
    version: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    """An engine in the student's folder. seconds: of building; None for one that was there before."""

    plan: EnginePlan
    seconds: float | None

    def in_words(self) -> str:
        """A cell of the export's table."""
        recipe = self.plan.recipe
        return f"{self.plan.precision}, {readable_size(self.plan.bytes)}, {recipe.package} for {', '.join(recipe.targets)}"


def toolchain(choice: str = "auto", target: str | None = None) -> Toolchain:
    """What to build with and for. choice: auto, rtx or full; auto takes TensorRT for RTX before the full one; target:
    compute capabilities with commas between. Raises ValueError, or StudentError without a GPU where one is needed."""
    if choice not in ("auto", *PACKAGES):
        raise ValueError(f"--tensorrt {choice!r}: legal are auto, {', '.join(PACKAGES)}")
    installed = installed_packages()
    wanted = [PACKAGES[choice]] if choice != "auto" else list(PACKAGES.values())
    package = next((package for package in wanted if package in installed), None)
    if package is None:
        raise ValueError(f"{' and '.join(wanted)} not installed: run `pip install {' or '.join(map(wheel, wanted))}`")
    legal, usual = (RTX_TARGETS, USUAL_TARGETS) if package == "tensorrt_rtx" else ((capability_here(),),) * 2
    targets = tuple(part.strip() for part in target.split(",")) if target else usual
    if unknown := [one for one in targets if one not in legal]:
        more = "others need --tensorrt full on such a GPU" if package == "tensorrt_rtx" else "it builds for the GPU at hand"
        said = f"{package} {installed[package]} builds for {', '.join(legal)}; {more}"
        raise ValueError(f"--target {', '.join(map(repr, unknown))}: {said}")
    return Toolchain(package, installed[package], tuple(sorted(set(targets), key=float)))


def wheel(package: Package) -> str:
    """What to install for a package, as pip is told."""
    return "'fewstep[tensorrt]'" if package == "tensorrt_rtx" else "tensorrt"


def capability_here() -> str:
    """The compute capability of the GPU at hand. Raises StudentError."""
    from server.engine.cuda_runtime import CudaRuntime

    return CudaRuntime().capability


def build_engines(folder: Path, tools: Toolchain, known: Path | None = None) -> list[Built]:
    """Builds the engines of `model_repository/<student>` and puts them in place whole; those of other packages and targets
    stay.

    known: another folder of the same student, in which engines may be found too. Raises ValueError for a graph that cannot be
    built, and StudentError for a damaged student; then nothing changes.
    """
    version = folder / "1"
    manifest = read_manifest(version / "student.json")
    before = known_plans(version) | (known_plans(known / "1") if known else {})
    with tempfile.TemporaryDirectory(dir=version, prefix=".engines-") as temporary:
        new = Path(temporary) / FOLDER
        new.mkdir()
        built = engines(version, manifest, tools, before, new)
        others = [kept for kept in before.values() if stays(kept[0], manifest, [one.plan for one in built])]
        for plan, path in others:
            place(path, new / plan.file)
        plans = (*(one.plan for one in built), *(plan for plan, _ in others))
        (new / MANIFEST).write_text(EngineManifest(format=1, engines=plans).model_dump_json(indent=1) + "\n")
        put_in_place(new, version / FOLDER)
    return built


def engines(version: Path, manifest: StudentManifest, tools: Toolchain, before: Known, new: Path) -> list[Built]:
    """The engines of the graphs as files in `new`; before: those that are known."""
    built: list[Built] = []
    text: dict[str, Shape] = {}
    for graph in manifest.graphs:
        files = {name: open_verified(version / name, manifest.files[name]) for name in graph_files(manifest, graph)}
        model = onnx.load_model_from_string(bytes(files[f"{graph}.onnx"]))
        recipe = recipe_of(manifest, graph, tools, model, text)
        built.append(engine(recipe, model, version, before, new))
        if graph == "text_encoder":
            text = text_shapes(model, recipe.usual)
    return built


def engine(recipe: Recipe, model: onnx.ModelProto, version: Path, before: Known, new: Path) -> Built:
    """The engine of a recipe as a file in `new`: the known one, or built now. version: where weights lie that are kept beside
    the graph."""
    if recipe.key() in before:
        plan, path = before[recipe.key()]
        place(path, new / plan.file)
        return Built(plan, None)
    begin = time.perf_counter()
    trt = importlib.import_module(recipe.package)
    with tqdm(
        desc=f"engine {recipe.graph}", bar_format="{desc}: {n_fmt} steps, {elapsed} {postfix}", dynamic_ncols=True
    ) as bar:
        built, precision = build_plan(trt, recipe, model, version / f"{recipe.graph}.onnx", monitor(trt, bar))
    (new / recipe.file).write_bytes(built)
    plan = EnginePlan(recipe=recipe, precision=precision, file=recipe.file, bytes=len(built), sha256=sha256_of(built))
    return Built(plan, time.perf_counter() - begin)


def recipe_of(
    manifest: StudentManifest, graph: GraphName, tools: Toolchain, model: onnx.ModelProto, text: dict[str, Shape]
) -> Recipe:
    """What decides the engine of a graph. text: see shapes.input_shapes."""
    return Recipe(
        graph=graph,
        onnx_sha256=graph_digest(manifest, graph),
        package=tools.package,
        version=tools.version,
        targets=tools.targets,
        profile=profile_of(manifest, graph, model, text),
    )


def profile_of(
    manifest: StudentManifest, graph: GraphName, model: onnx.ModelProto, text: dict[str, Shape]
) -> dict[str, ShapeRange]:
    """From one picture of the smallest size to the most of the largest. Tuned for the default size, and for the batch that
    `determinism=strict` always runs."""
    dims, most = declared(model), most_rows(graph, manifest)
    every = [input_shapes(dims, manifest, size, batch, text) for size in manifest.sizes for batch in (1, most)]
    usual = every[0 if graph == "vae_decoder" else 1]
    return {name: ShapeRange(min=extreme(min, every, name), opt=usual[name], max=extreme(max, every, name)) for name in dims}


def extreme(pick: Callable[[tuple[int, ...]], int], every: list[dict[str, Shape]], name: str) -> Shape:
    """The least or the most that each dimension of an input may be."""
    return tuple(pick(dims) for dims in zip(*(shapes[name] for shapes in every), strict=True))


def known_plans(version: Path) -> Known:
    """Key -> engine and file, for every engine in a folder whose bytes are still those that were built."""
    try:
        student = read_manifest(version / "student.json")
        plans = read_engines(version, student).engines
    except StudentError:
        return {}
    return {plan.recipe.key(): (plan, version / FOLDER / plan.file) for plan in plans if intact(version, plan)}


def intact(version: Path, plan: EnginePlan) -> bool:
    try:
        return bool(read_plan(version, plan))
    except StudentError:
        return False


def stays(plan: EnginePlan, manifest: StudentManifest, built: list[EnginePlan]) -> bool:
    """Whether an engine is kept beside those just built: of the same student, and none of them takes its place."""
    same = [(one.recipe.graph, one.recipe.package, one.recipe.targets) for one in built]
    ours = plan.recipe.onnx_sha256 == graph_digest(manifest, plan.recipe.graph)
    return ours and (plan.recipe.graph, plan.recipe.package, plan.recipe.targets) not in same


def place(source: Path, target: Path) -> None:
    """The same file under another name, without copying it where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def monitor(trt: Any, bar: "tqdm[Any]") -> Any:
    """Shows TensorRT's phases in a bar."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            bar.set_postfix_str(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            bar.update()
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def as_text(built: list[Built]) -> str:
    """The table that ends a build."""
    rows = [["graph", "precision", "built by", "size", "seconds", "for compute capability"]]
    for one in built:
        recipe, seconds = one.plan.recipe, "kept" if one.seconds is None else f"{one.seconds:.1f}"
        package = f"{recipe.package} {recipe.version}"
        rows.append(
            [recipe.graph, one.plan.precision, package, readable_size(one.plan.bytes), seconds, ", ".join(recipe.targets)]
        )
    return "\n".join(aligned(rows, right={3, 4}))

"""engines.json: what each TensorRT engine of a student was built from, for which GPUs, and whether it may be loaded here.

Engines lie in `model_repository/<student>/1/engines/`, each as `<graph>.<key>.plan`. A plan is code that runs on the GPU, and
one that does not fit makes TensorRT fail far from the cause, so everything is checked before TensorRT sees a byte of it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from server.engine.errors import StudentError
from server.engine.student import GraphName, Sha256, StudentManifest, open_verified, read

FOLDER, MANIFEST = "engines", "engines.json"
Package = Literal["tensorrt_rtx", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16"]
Capability = Annotated[str, Field(pattern=r"^[1-9][0-9]?\.[0-9]$")]

# From https://developer.nvidia.com/cuda-gpus: a few of each compute capability, for people who know their card by its name.
GPUS = {
    "7.5": "T4, RTX 20",
    "8.0": "A100, A30",
    "8.6": "A10, A40, RTX 30",
    "8.9": "L4, L40S, RTX 40",
    "9.0": "H100, H200",
    "10.0": "B200, GB200",
    "10.3": "B300, GB300",
    "12.0": "RTX 50, RTX PRO Blackwell",
    "12.1": "DGX Spark",
}
RTX_TARGETS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # what TensorRT for RTX 1.7 builds for; others need the full one


class Strict(BaseModel):
    """No key may be added, and no value changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ShapeRange(Strict):
    """The shapes that one input may have, and the one an engine is tuned for."""

    min: tuple[PositiveInt, ...]
    opt: tuple[PositiveInt, ...]
    max: tuple[PositiveInt, ...]

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether an input of this shape can be run."""
        return len(shape) == len(self.min) and all(
            low <= dim <= high for low, dim, high in zip(self.min, shape, self.max, strict=True)
        )


class BuilderSettings(Strict):
    """What the builder was told. Every network is strongly typed: it computes in the precision that its graph states.

    Without tf32 float32 means float32; strict_nans: 0 * x is 0 only where x is finite, on which device_step.py relies.
    """

    optimisation_level: Annotated[int, Field(ge=0, le=5)] = 3
    tf32: bool = False
    strict_nans: Literal[True] = True


class Recipe(Strict):
    """Everything that decides what an engine is. Building twice gives other bytes, so an engine is known by this alone.

    version: of the package; targets: compute capabilities; profile: by input.
    """

    graph: GraphName
    onnx_sha256: Sha256
    package: Package
    version: str
    targets: Annotated[tuple[Capability, ...], Field(min_length=1)]
    profile: dict[str, ShapeRange]
    settings: BuilderSettings = BuilderSettings()

    def key(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def usual(self) -> dict[str, tuple[int, ...]]:
        """The shapes that it is tuned for."""
        return {name: shape.opt for name, shape in self.profile.items()}

    @property
    def file(self) -> str:
        return f"{self.graph}.{self.key()}.plan"


class EnginePlan(Strict):
    """One engine: its recipe, what it computes in (of most layers), and the file."""

    recipe: Recipe
    precision: Precision
    file: str
    bytes: PositiveInt
    sha256: Sha256

    @model_validator(mode="after")
    def named_by_its_recipe(self) -> "EnginePlan":
        """Raises ValueError where the file's name is not the recipe's, so that no name can lead elsewhere."""
        if self.file != self.recipe.file:
            raise ValueError(f"file {self.file!r} is not named by its recipe, {self.recipe.file}")
        return self


class EngineManifest(Strict):
    """engines.json."""

    format: Literal[1]
    engines: tuple[EnginePlan, ...]

    def of(self, graph: GraphName) -> tuple[EnginePlan, ...]:
        """The engines of one graph."""
        return tuple(plan for plan in self.engines if plan.recipe.graph == graph)


def graph_files(student: StudentManifest, graph: GraphName) -> list[str]:
    """The files of a graph: itself, and its weights where they are kept beside it."""
    return sorted(name for name in student.files if name.startswith(f"{graph}.onnx"))


def graph_digest(student: StudentManifest, graph: GraphName) -> str:
    """The digest of a graph's one file, or over those of all its files."""
    first, *others = [student.files[name] for name in graph_files(student, graph)]
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first


def read_engines(version: Path, student: StudentManifest) -> EngineManifest:
    """The engines in `model_repository/<student>/1`, none if there is no folder of them.

    Raises StudentError for a manifest that is not one, for an engine of another student's graph, and for a file that the
    manifest does not name.
    """
    folder = version / FOLDER
    if not folder.exists():
        return EngineManifest(format=1, engines=())
    try:
        manifest = EngineManifest.model_validate_json(read(folder / MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise StudentError(f"{folder / MANIFEST}: {where}: {first['msg']}; {rebuild(version)}") from None
    for plan in manifest.engines:
        if plan.recipe.onnx_sha256 != graph_digest(student, plan.recipe.graph):
            raise StudentError(f"{folder / plan.file} was built from another {plan.recipe.graph}.onnx; {rebuild(version)}")
    named = {MANIFEST, *(plan.file for plan in manifest.engines)}
    for path in sorted(folder.iterdir()):
        if path.name not in named:
            raise StudentError(f"{path} is not in {MANIFEST}, so no digest covers it; move it away")
    return manifest


def read_plan(version: Path, plan: EnginePlan) -> bytes:
    """The bytes of an engine; raises StudentError when they are not those that were built."""
    return bytes(open_verified(version / FOLDER / plan.file, plan.sha256, rebuild(version)))


def fitting(manifest: EngineManifest, graph: GraphName, packages: Sequence[str], capability: str, version: Path) -> EnginePlan:
    """The engine of a graph that one of the installed packages ("tensorrt_rtx 1.7.1.116") can load on this GPU.

    Raises StudentError with what there is instead, and what to do.
    """
    plans = manifest.of(graph)
    if not plans:
        raise StudentError(f"{version.parent} holds no TensorRT engine of {graph}; {build(version, capability, packages)}")
    for plan in plans:
        if capability in plan.recipe.targets and built_by(plan.recipe) in packages:
            return plan
    held = "; ".join(f"built for {', '.join(plan.recipe.targets)} with {built_by(plan.recipe)}" for plan in plans)
    raise StudentError(
        f"{graph}: {held}; this GPU is {capability}, with {', '.join(packages)}: {build(version, capability, packages)}"
    )


def check_profile(plan: EnginePlan, wanted: dict[str, tuple[int, ...]], version: Path) -> None:
    """Raises StudentError when an engine cannot run inputs of these shapes."""
    for name, shape in wanted.items():
        held = plan.recipe.profile[name]
        if not held.holds(shape):
            spans = f"the engine takes {list(held.min)} to {list(held.max)}"
            raise StudentError(f"{plan.file}: {name} may be {list(shape)}, and {spans}; {rebuild(version)}")


def built_by(recipe: Recipe) -> str:
    """Package and version in words."""
    return f"{recipe.package} {recipe.version}"


def fits(recipe: Recipe) -> list[str]:
    """The GPUs of an engine in words, a few by their names."""
    return [f"{target} ({GPUS[target]})" if target in GPUS else target for target in recipe.targets]


def build(version: Path, capability: str, packages: Sequence[str]) -> str:
    """The command that makes engines for a GPU, by what is installed if that can."""
    rtx = capability in RTX_TARGETS and any(package.startswith("tensorrt_rtx ") for package in packages)
    how = f"rtx --target {capability}" if rtx else "full"
    return f"run fewstep engines {version.parent} --tensorrt {how}"


def rebuild(version: Path) -> str:
    """The command that makes engines anew."""
    return f"remove {version / FOLDER} and run fewstep engines {version.parent}"

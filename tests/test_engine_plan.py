"""engines.json is strict, and what an engine was not built for is told before anything is loaded."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.engine.engine_plan import (
    FOLDER,
    MANIFEST,
    EngineManifest,
    EnginePlan,
    Recipe,
    ShapeRange,
    check_profile,
    fitting,
    read_engines,
    read_plan,
)
from server.engine.errors import StudentError
from server.engine.student import StudentManifest, read_manifest

RTX = "tensorrt_rtx 1.7.1"


@pytest.fixture
def version(own_repository: Path) -> Path:
    return own_repository / "tiny" / "1"


@pytest.fixture
def student(version: Path) -> StudentManifest:
    return read_manifest(version / "student.json")


def plan_of(student: StudentManifest, contents: bytes = b"plan", **changes: Any) -> EnginePlan:
    """An engine of student_step as a builder describes it."""
    recipe = Recipe(
        **{
            "graph": "student_step",
            "onnx_sha256": student.files["student_step.onnx"],
            "package": "tensorrt_rtx",
            "version": "1.7.1",
            "targets": ("8.6", "8.9"),
            "profile": {"latents": ShapeRange(min=(1, 4, 4, 8), opt=(4, 4, 8, 8), max=(4, 4, 8, 8))},
        }
        | changes
    )
    digest = hashlib.sha256(contents).hexdigest()
    return EnginePlan(recipe=recipe, precision="fp32", file=recipe.file, bytes=len(contents), sha256=digest)


def put(version: Path, *plans: EnginePlan, contents: bytes = b"plan") -> Path:
    """Writes engines and their manifest, and returns where the manifest is."""
    folder = version / FOLDER
    folder.mkdir()
    for plan in plans:
        (folder / plan.file).write_bytes(contents)
    (folder / MANIFEST).write_text(EngineManifest(format=1, engines=plans).model_dump_json())
    return folder / MANIFEST


def test_what_was_written_is_what_is_read(version: Path, student: StudentManifest) -> None:
    plan = plan_of(student)
    put(version, plan)
    assert read_engines(version, student).engines == (plan,)
    assert read_plan(version, plan) == b"plan"


def test_a_student_without_engines_has_none(version: Path, student: StudentManifest) -> None:
    assert read_engines(version, student).engines == ()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("extra",), 1),
        (("format",), 2),
        (("engines", 0, "extra"), 1),
        (("engines", 0, "recipe", "extra"), 1),
        (("engines", 0, "recipe", "settings", "extra"), 1),
        (("engines", 0, "recipe", "graph"), "other"),
        (("engines", 0, "recipe", "package"), "torch"),
        (("engines", 0, "recipe", "targets"), []),
        (("engines", 0, "recipe", "targets"), ["sm_89"]),
        (("engines", 0, "recipe", "version"), "1.7.2"),
        (("engines", 0, "file"), "../../../model.py"),
        (("engines", 0, "sha256"), "short"),
        (("engines", 0, "precision"), "int3"),
    ],
)
def test_a_manifest_with_anything_else_in_it_is_refused_in_one_line(
    version: Path, student: StudentManifest, path: tuple[Any, ...], value: Any
) -> None:
    file = put(version, plan_of(student))
    document = json.loads(file.read_text())
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    file.write_text(json.dumps(document))
    with pytest.raises(StudentError, match=r"engines\.json: .*run fewstep engines") as caught:
        read_engines(version, student)
    assert "\n" not in str(caught.value)


def test_every_key_is_required(student: StudentManifest) -> None:
    whole = plan_of(student).model_dump(mode="json")
    for key in whole:
        with pytest.raises(ValidationError):
            EnginePlan.model_validate({name: value for name, value in whole.items() if name != key})


@pytest.mark.parametrize(
    "changes",
    [
        {"onnx_sha256": "0" * 64},
        {"version": "1.7.2"},
        {"package": "tensorrt"},
        {"targets": ("8.6",)},
        {"profile": {}},
        {"settings": {"optimisation_level": 5}},
    ],
)
def test_everything_that_decides_an_engine_is_in_its_key(student: StudentManifest, changes: dict[str, Any]) -> None:
    assert plan_of(student, **changes).recipe.key() != plan_of(student).recipe.key()
    assert plan_of(student, contents=b"built again").recipe.key() == plan_of(student).recipe.key()


def test_an_engine_of_another_student_s_graph_is_refused(version: Path, student: StudentManifest) -> None:
    put(version, plan_of(student, onnx_sha256="0" * 64))
    with pytest.raises(StudentError, match=r"was built from another student_step\.onnx; .*run fewstep engines"):
        read_engines(version, student)


def test_a_file_that_the_manifest_does_not_name_is_refused(version: Path, student: StudentManifest) -> None:
    put(version, plan_of(student))
    (version / FOLDER / "other.plan").write_bytes(b"anything")
    with pytest.raises(StudentError, match=r"other\.plan is not in engines\.json"):
        read_engines(version, student)


def test_a_plan_with_another_digest_is_refused(version: Path, student: StudentManifest) -> None:
    plan = plan_of(student)
    put(version, plan, contents=b"other")
    with pytest.raises(StudentError, match=r"\.plan: sha256 is .*run fewstep engines"):
        read_plan(version, plan)


@pytest.mark.parametrize(
    ("capability", "package", "how"),
    [
        ("9.0", RTX, "full"),
        ("8.0", RTX, "rtx --target 8.0"),
        ("8.9", "tensorrt_rtx 1.8.0", "rtx --target 8.9"),
        ("8.9", "tensorrt 11.0", "full"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_what_it_is_for_and_what_to_do(
    version: Path, student: StudentManifest, capability: str, package: str, how: str
) -> None:
    engines = EngineManifest(format=1, engines=(plan_of(student),))
    with pytest.raises(StudentError) as caught:
        fitting(engines, "student_step", [package], capability, version)
    assert str(caught.value) == (
        f"student_step: built for 8.6, 8.9 with tensorrt_rtx 1.7.1; this GPU is {capability}, with {package}: "
        f"run fewstep engines {version.parent} --tensorrt {how}"
    )


def test_of_several_engines_the_one_that_fits_is_taken(version: Path, student: StudentManifest) -> None:
    plans = (plan_of(student), plan_of(student, package="tensorrt", version="11.0", targets=("9.0",)))
    engines = EngineManifest(format=1, engines=plans)
    assert fitting(engines, "student_step", [RTX], "8.9", version) == plans[0]
    assert fitting(engines, "student_step", [RTX, "tensorrt 11.0"], "9.0", version) == plans[1]
    with pytest.raises(StudentError, match="holds no TensorRT engine of vae_decoder; run fewstep engines"):
        fitting(engines, "vae_decoder", [RTX], "8.9", version)


@pytest.mark.parametrize("shape", [(5, 4, 8, 8), (4, 4, 9, 8), (1, 4, 2, 8), (4, 4, 8)])
def test_shapes_beyond_an_engine_s_profile_are_refused(version: Path, student: StudentManifest, shape: tuple[int, ...]) -> None:
    check_profile(plan_of(student), {"latents": (2, 4, 4, 8)}, version)
    with pytest.raises(StudentError, match=r"latents may be .*, and the engine takes \[1, 4, 4, 8\] to \[4, 4, 8, 8\]"):
        check_profile(plan_of(student), {"latents": shape}, version)

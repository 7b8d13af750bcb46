"""`fewstep inspect`: what an exported student is, where it came from and what it would be on this machine."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.engine.engine import Engine
from server.engine.engine_plan import FOLDER, EngineManifest, built_by, fits, read_engines, read_plan
from server.engine.errors import StudentError
from server.engine.student import MEND, ExportedStudent, StudentManifest, open_student, read
from server.engine.triton_config import MODEL_PY, triton_config
from server.table import aligned, readable_size

REPORT = ("report.json", "report.md", "report.png")  # what `fewstep export` leaves beside the student, for people
GENERATED = ("student.json", "model.py", FOLDER, "__pycache__")  # the last is Triton's


@dataclass(frozen=True)
class Inspection:
    """A verified student. engines: those of TensorRT; report: the exporter's report.json, if there is one; fingerprint: this
    machine's, None where it cannot compute the student's precision."""

    folder: Path
    student: ExportedStudent
    engines: EngineManifest
    report: dict[str, Any] | None
    fingerprint: str | None
    fingerprint_parts: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Everything that the text says, for machines."""
        manifest, files = self.student.manifest, self.student.files
        return {
            "folder": str(self.folder),
            "manifest": manifest.model_dump(mode="json"),
            "manifest_sha256": manifest.digest(),
            "files": [
                {"name": name, "bytes": len(contents), "sha256": manifest.files[name], "verified": True}
                for name, contents in files.items()
            ],
            "bytes": sum(map(len, files.values())),
            "engines": [plan.model_dump(mode="json") | {"verified": True} for plan in self.engines.engines],
            "report": self.report,
            "fingerprint": self.fingerprint,
            "fingerprint_parts": self.fingerprint_parts,
        }


def inspect(folder: Path) -> Inspection:
    """Verifies every file of `model_repository/<student>` and opens its graphs.

    Raises StudentError in one line for a folder that is no exported student, and for a file that is missing, unknown or not
    the one that was exported.
    """
    folder = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
    check_folder(folder)
    student = open_student(folder)
    check_generated(folder, student.manifest)
    check_known(folder, student.manifest)
    engines = verified_engines(folder / "1", student.manifest)
    report = read_report(folder, student.manifest)
    if "bf16" in student.manifest.precision.values():
        return Inspection(folder, student, engines, report, None, {})
    engine = Engine.of(student)
    return Inspection(folder, student, engines, report, engine.fingerprint, engine.fingerprint_parts)


def verified_engines(version: Path, student: StudentManifest) -> EngineManifest:
    """The TensorRT engines; raises StudentError when one is damaged, another student's, or in no manifest."""
    engines = read_engines(version, student)
    for plan in engines.engines:
        read_plan(version, plan)
    return engines


def check_folder(folder: Path) -> None:
    """Raises StudentError for a folder that is no exported student, with what it seems to be instead."""
    if not folder.is_dir():
        raise StudentError(f"{folder} is no folder; name an exported student, e.g. model_repository/scenes")
    if (folder / "1").is_dir():
        return
    if (folder / "model_index.json").is_file():
        raise StudentError(f"{folder} is not exported yet; run `fewstep export {folder} --to model_repository`")
    if held := [path.name for path in sorted(folder.iterdir()) if (path / "1" / "student.json").is_file()]:
        raise StudentError(f"{folder} holds students, name one: {', '.join(str(folder / name) for name in held)}")
    raise StudentError(
        f"{folder} is no exported student: it has no folder 1; `fewstep export FOLDER --to REPOSITORY` makes one"
    )


def check_generated(folder: Path, manifest: StudentManifest) -> None:
    """Raises StudentError when what Triton reads is not what the exporter writes for this manifest; no digest covers it."""
    for path, expected in ((folder / "config.pbtxt", triton_config(manifest)), (folder / "1" / "model.py", MODEL_PY)):
        if read(path) != expected.encode():
            raise StudentError(f"{path} is not what this version of fewstep writes for this student; {MEND}")


def check_known(folder: Path, manifest: StudentManifest) -> None:
    """Raises StudentError for a file that no exporter has written."""
    known = {"": {"1", "config.pbtxt", *REPORT}, "1": {*manifest.file_names, *GENERATED}}
    for place, names in known.items():
        for path in sorted((folder / place).iterdir()):
            if path.name not in names:
                raise StudentError(f"{path} belongs to no student: nothing reads it and no digest covers it; move it away")


def read_report(folder: Path, manifest: StudentManifest) -> dict[str, Any] | None:
    """The exporter's report.json; raises StudentError when it is damaged or about another student."""
    path = folder / "report.json"
    if not path.exists():
        return None
    try:
        report = json.loads(read(path))
        said, passed = report["manifest_sha256"], all(check["passed"] for check in report["checks"])
    except (ValueError, KeyError, TypeError):
        raise StudentError(f"{path} is damaged; {MEND}") from None
    if said != manifest.digest() or not passed:
        raise StudentError(f"{path} is the report of another student; {MEND}")
    return dict(report)


def as_text(inspection: Inspection) -> str:
    """The inspection for a person: aligned, without colours."""
    manifest, said = inspection.student.manifest, inspection.report
    proof = f"{len(said['checks'])} checks passed at export, see {inspection.folder / 'report.md'}" if said else "none"
    ladder = ", ".join(f"{nfe} (default)" if nfe == manifest.default_nfe else str(nfe) for nfe in manifest.nfe)
    conditioned = "one set of weights told its NFE" if manifest.k_conditioning else "not told its NFE"
    facts = [
        ("name", manifest.name),
        ("family", f"{plain(manifest.family)}, makes {manifest.media_type}s"),
        ("base", plain(manifest.base)),
        ("revision", plain(manifest.revision)),
        *labelled("training", [f"{plain(name)}: {plain(value)}" for name, value in manifest.training.items()]),
        ("exported by", ", ".join(f"{plain(name)} {plain(version)}" for name, version in manifest.versions.items())),
        ("NFE", f"{ladder}; {conditioned}"),
        ("prompts", f"at most {manifest.max_prompt_characters} characters, read as {manifest.text_length} tokens"),
        ("batches", f"at most {manifest.max_batch} images"),
        (
            "sampler",
            f"{plain(manifest.solver)} on {plain(manifest.prediction_type)}, noise of sigma {manifest.init_noise_sigma:g}",
        ),
        ("", "next = c0 * latents + c1 * x0 + c2 * x0_prev"),
    ]
    machine = [
        *labelled("engines", engine_lines(inspection.engines)),
        ("report", proof),
        *identity(inspection),
    ]
    parts = (aligned(facts), tables(manifest), sizes(manifest), files(inspection.student), aligned(machine))
    return "\n\n".join("\n".join(part) for part in parts)


def engine_lines(engines: EngineManifest) -> list[str]:
    """A line per engine, and which GPUs they fit."""
    if not engines.engines:
        return ["none; the graphs run on onnxruntime"]
    rows = [
        (plan.recipe.graph, plan.precision, readable_size(plan.bytes), built_by(plan.recipe), ", ".join(plan.recipe.targets))
        for plan in engines.engines
    ]
    head = ("graph", "precision", "size", "built by", "for compute capability")
    gpus = dict.fromkeys(gpu for plan in engines.engines for gpu in fits(plan.recipe))
    return [*aligned([head, *rows], right={2}), f"these are GPUs such as {'; '.join(gpus)}"]


def identity(inspection: Inspection) -> list[tuple[str, str]]:
    """Rows of the fingerprint on this machine."""
    if inspection.fingerprint is None:
        return [("fingerprint", "none: onnxruntime computes no bf16 on CPU, this student is for TensorRT or CUDA")]
    parts = aligned([(name, part) for name, part in inspection.fingerprint_parts.items()])
    return [("fingerprint", f"{inspection.fingerprint} (on this machine)"), *labelled("of", parts)]


def labelled(label: str, lines: list[str]) -> list[tuple[str, str]]:
    """Rows of which the first alone has the label."""
    return [(label if index == 0 else "", line) for index, line in enumerate(lines or ["not stated"])]


def plain(value: Any) -> str:
    """Text as it is, unless it could spoil a line or move a terminal's cursor; anything else as JSON."""
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def tables(manifest: StudentManifest) -> list[str]:
    """The sampler tables, a line per step."""
    rows = [["NFE", "step", "timestep", "c0", "c1", "c2"]]
    for nfe in manifest.nfe:
        for index, (timestep, *coefficients) in enumerate(manifest.tables[str(nfe)]):
            shown = [f"{timestep:.2f}", *(f"{value:.4f}" for value in coefficients)]
            rows.append([str(nfe) if index == 0 else "", str(index + 1), *shown])
    return aligned(rows, right=range(6))


def sizes(manifest: StudentManifest) -> list[str]:
    """Sizes of pictures and of their latents; the first is the default."""
    rows = [("size", "latents [C, h, w]" if manifest.media_type == "image" else "latents [F, C, h, w]")]
    for index, (size, shape) in enumerate(manifest.sizes.items()):
        rows.append((f"{size} (default)" if index == 0 else size, str(list(shape))))
    return aligned(rows)


def files(student: ExportedStudent) -> list[str]:
    """The files that the digests cover. All are verified: a student with another file was refused."""
    manifest = student.manifest
    precision = {f"{graph}.onnx": manifest.precision[graph] for graph in manifest.graphs}
    rows = [("file", "precision", "size", "sha256", "")]
    for name, contents in student.files.items():
        rows.append((name, precision.get(name, ""), readable_size(len(contents)), manifest.files[name][:12], "verified"))
    total = sum(map(len, student.files.values()))
    return aligned([*rows, ("in all", "", readable_size(total), "", "")], right={2})

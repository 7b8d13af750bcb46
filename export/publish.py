"""A student folder -> model_repository/<student>/, proven first and put in place whole."""

import datetime
import hashlib
import shutil
import tempfile
import time
from pathlib import Path

import diffusers
import onnx
import onnxruntime
import torch
from tqdm import tqdm

from export.graphs import pixel_size
from export.linear_samplers import prediction_type, solver_name
from export.onnx import export_graph, student_graphs
from export.report import GraphFile, Report, write_report
from export.sampler_table import Row, sampler_table
from export.verify import verify
from server.engine.student import GRAPHS, StudentManifest
from server.engine.triton_config import MODEL_PY, triton_config
from tdm_train.checkpoint import Student, load_student

MAX_BATCH = 16
MAX_PROMPT_CHARACTERS = 300


class ExportRefused(ValueError):
    """The exported graphs do not equal PyTorch, so nothing was published."""


def export_student(folder: Path, repository: Path, dry_run: bool = False) -> tuple[Path, Report]:
    """Exports the student in `folder` and publishes it as `repository/<name>`; returns that path and what was proven.

    A dry run does all the same but publish, and leaves `repository` alone. Raises ValueError for a folder that is no student,
    and ExportRefused when a check fails: then nothing changes.
    """
    student = load_student(folder)
    if not dry_run:
        repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=None if dry_run else repository, prefix=".export-") as temporary:
        built, target = Path(temporary) / student.description.name, repository / student.description.name
        report = build(student, built)
        if failed := [check for check in report.checks if not check.passed]:
            lines = "; ".join(f"{check.what}: {check.error:.3g} > {check.tolerance:.3g}" for check in failed)
            raise ExportRefused(f"nothing was published, the graphs differ from PyTorch: {lines}")
        if not dry_run:
            for _ in tqdm(range(1), desc="publishing", dynamic_ncols=True):
                replace_folder(built, target)
        return target, report


def build(student: Student, folder: Path) -> Report:
    """Writes the whole exported student into `folder`, checks it, and reports beside it."""
    begin = time.perf_counter()
    version, tables = folder / "1", sampler_tables(student)
    version.mkdir(parents=True)
    graphs, seconds = student_graphs(student, MAX_BATCH), {}
    with tqdm(graphs, desc="exporting", dynamic_ncols=True) as bar:
        for graph in bar:
            bar.set_postfix_str(graph.name)
            started = time.perf_counter()
            export_graph(graph, version / f"{graph.name}.onnx", MAX_BATCH, student.description.text_length)
            seconds[graph.name] = time.perf_counter() - started
    student.pipeline.tokenizer.backend_tokenizer.save(str(version / "tokenizer.json"))
    manifest = describe(student, tables, version)
    (version / "student.json").write_text(manifest.model_dump_json(indent=1) + "\n")
    (version / "model.py").write_text(MODEL_PY)
    (folder / "config.pbtxt").write_text(triton_config(manifest))
    proof = verify(student, graphs, version, tables)
    files = tuple(
        GraphFile(graph, manifest.precision[graph], (version / f"{graph}.onnx").stat().st_size, seconds[graph])
        for graph in GRAPHS
    )
    report = Report(manifest, files, proof.checks, time.perf_counter() - begin)
    write_report(report, proof, folder)
    return report


def sampler_tables(student: Student) -> dict[str, list[Row]]:
    """NFE count (as text, for JSON) -> rows of the sampler table."""
    return {str(nfe): sampler_table(student.pipeline.scheduler, nfe) for nfe in student.nfe_set}


def describe(student: Student, tables: dict[str, list[Row]], version: Path) -> StudentManifest:
    """The manifest of the files in `version`."""
    transformer, described, scheduler = (
        student.pipeline.transformer.config,
        student.description,
        student.pipeline.scheduler,
    )
    side = pixel_size(student.pipeline.vae, transformer.sample_size)
    files = ("text_encoder.onnx", "student_step.onnx", "vae_decoder.onnx", "tokenizer.json")
    return StudentManifest.model_validate(
        {
            "format": 1,
            "name": described.name,
            "family": described.family,
            "media_type": "image",
            "base": described.base,
            "revision": datetime.date.today().isoformat(),
            "prediction_type": prediction_type(scheduler),
            "solver": solver_name(scheduler),
            "nfe": described.nfe,
            "default_nfe": described.default_nfe,
            "tables": tables,
            "sizes": {f"{side}x{side}": [transformer.in_channels, transformer.sample_size, transformer.sample_size]},
            "text_length": described.text_length,
            "max_prompt_characters": MAX_PROMPT_CHARACTERS,
            "max_batch": MAX_BATCH,
            "init_noise_sigma": float(getattr(scheduler, "init_noise_sigma", 1.0)),
            "precision": dict.fromkeys(("text_encoder", "student_step", "vae_decoder"), "fp32"),
            "k_conditioning": True,
            "training": described.training,
            "files": {name: hashlib.sha256((version / name).read_bytes()).hexdigest() for name in files},
            "versions": {
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
            },
        }
    )


def replace_folder(built: Path, target: Path) -> Path:
    """Moves `built` to `target` (same file system); what was there goes only when the new one is in place."""
    old = built.parent / "old"
    if target.exists():
        target.rename(old)
    built.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target

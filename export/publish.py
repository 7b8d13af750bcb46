"""A student folder -> model_repository/<student>/, proven first and put in place whole."""

import datetime
import errno
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import onnx
import onnxruntime
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderTiny
from tqdm import tqdm

from export.exchange import put_in_place
from export.families import FAMILIES
from export.linear_samplers import prediction_type, solver_name
from export.onnx import export_graph
from export.precision import ALL_FP32, in_precision, refuse_half_vae, refuse_overflow
from export.report import GraphFile, Report, write_report
from export.sampler_table import Row, sampler_table
from export.student_graphs import MAX_BATCH, example_shape, student_graphs
from export.tensorrt import Built, Toolchain, build_engines
from export.verify import Form, Forms, verify
from export.video_decoders import VideoDecoder, chunks_of
from server.engine.errors import NumericalError
from server.engine.student import STAGES, GraphName, Precision, StudentManifest, weights_of
from server.engine.triton_config import MODEL_PY, triton_config
from tdm_train.backbones import backbone_of
from tdm_train.checkpoint import Student, load_student

FEWEST_CHARACTERS, CHARACTERS_PER_TOKEN = 300, 8  # of the longest legal prompt; a prompt of too many tokens is refused later
TINY = "vae_tiny"  # where a student folder keeps a distilled decoder
Decoder = Literal["full", "tiny"]


class ExportRefused(ValueError):
    """The exported graphs do not equal PyTorch, or cannot be written, so nothing was published."""


def export_student(
    folder: Path,
    repository: Path,
    dry_run: bool = False,
    decoder: Decoder = "full",
    precisions: Mapping[GraphName, Precision] = ALL_FP32,
    tensorrt: Toolchain | None = None,
) -> tuple[Path, Report]:
    """Exports the student in `folder` and publishes it as `repository/<name>`; returns that path and what was proven.

    decoder: full, or tiny for the AutoencoderTiny in `folder/vae_tiny`, published as `<name>-tiny`. precisions: of the weights
    and the arithmetic of each graph. tensorrt: builds engines too; those of the student that is there already are kept where
    they are the same. A dry run does all the same but publish, and leaves `repository` alone. Raises ValueError for a folder
    that is no student and for a stage that cannot have its precision, and ExportRefused when a check fails or the files cannot
    be written: then nothing changes.
    """
    student = load_student(folder)
    vae = student.pipeline.vae if decoder == "full" else open_tiny_decoder(folder)
    refuse_half_vae(vae, precisions["vae_decoder"])
    name = student.description.name if decoder == "full" else f"{student.description.name}-tiny"
    with one_reason(repository):
        if not dry_run:
            repository.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=None if dry_run else repository, prefix=".export-") as temporary:
            built, target = Path(temporary) / name, repository / name
            engines = (lambda: build_engines(built, tensorrt, target)) if tensorrt else list
            report = build(student, vae, built, precisions, engines)
            if failed := [check for check in report.checks if not check.passed]:
                lines = "; ".join(f"{check.what}: {check.error:.3g} > {check.tolerance:.3g}" for check in failed)
                raise ExportRefused(f"nothing was published, the graphs differ from PyTorch: {lines}")
            if not dry_run:
                for _ in tqdm(range(1), desc="publishing", dynamic_ncols=True):
                    put_in_place(built, target)
            return target, report


@contextmanager
def one_reason(repository: Path) -> Iterator[None]:
    """Turns what a file system refuses, and a student that gives no numbers, into an ExportRefused of one line."""
    try:
        yield
    except OSError as error:
        free = "; make room, or name another --to" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise ExportRefused(f"nothing was published, {repository} cannot be written: {error.strerror}{free}") from None
    except NumericalError as error:
        raise ExportRefused(f"nothing was published: {error}; a stage overflows, export it in fp32 or bf16") from None


def open_tiny_decoder(folder: Path) -> AutoencoderTiny:
    """The student's distilled decoder in float32; raises ValueError where it has none."""
    if not (folder / TINY / "config.json").is_file():
        raise ValueError(f"{folder} has no tiny decoder: {TINY} must hold an AutoencoderTiny made for this student's latents")
    return AutoencoderTiny.from_pretrained(folder / TINY, torch_dtype=torch.float32, use_safetensors=True).eval()


def build(
    student: Student,
    vae: Any,
    folder: Path,
    precisions: Mapping[GraphName, Precision],
    engines: Callable[[], list[Built]],
) -> Report:
    """Writes the whole exported student into `folder`, checks it, and reports beside it. engines: builds them there."""
    begin = time.perf_counter()
    version, tables = folder / "1", sampler_tables(student)
    version.mkdir(parents=True)
    forms = forms_of(student, vae, precisions)
    seconds = export_graphs(forms.exported, version, precisions)
    for name, tokenizer in FAMILIES[student.description.family].tokenizer_files(student).items():
        (version / name).write_text(tokenizer.to_str(pretty=True))
    manifest = describe(student, vae, folder, tables, precisions)
    (version / "student.json").write_text(manifest.model_dump_json(indent=1) + "\n")
    (version / "model.py").write_text(MODEL_PY)
    (folder / "config.pbtxt").write_text(triton_config(manifest))
    proof = verify(forms, folder)
    engine = {built.plan.recipe.graph: built.in_words() for built in engines()}
    files = tuple(
        GraphFile(graph, manifest.precision[graph], bytes_of(version / f"{graph}.onnx"), seconds[graph], engine.get(graph))
        for graph in manifest.graphs
    )
    report = Report(manifest, files, proof.checks, time.perf_counter() - begin)
    write_report(report, proof, folder)
    return report


def forms_of(student: Student, vae: Any, precisions: Mapping[GraphName, Precision]) -> Forms:
    """The student as it was trained, as it is exported, and as onnxruntime computes it on this machine."""
    shapes = list(latent_shapes(student).values())

    def form(told: Mapping[GraphName, Precision], of: tuple[Student, Any]) -> tuple[Form, tuple[Student, Any]]:
        cast = in_precision(*of, told)
        graphs = {graph.name: graph for graph in student_graphs(*cast, shapes)}
        video = isinstance(cast[1], AutoencoderKLCogVideoX)
        return Form(cast[0], graphs, VideoDecoder(cast[1]) if video else graphs["vae_decoder"].module), cast

    float32, trained = form(ALL_FP32, (student, vae))
    if precisions == ALL_FP32:
        return Forms(float32, float32, float32)
    exported, half = form(precisions, trained)
    here, _ = form({graph: "fp32" if said == "bf16" else said for graph, said in precisions.items()}, half)
    return Forms(float32, exported, here)


def export_graphs(form: Form, version: Path, precisions: Mapping[GraphName, Precision]) -> dict[str, float]:
    """Writes every graph of a student as `version/<graph>.onnx`; returns the seconds each took. Raises ValueError for a stage
    that overflows in its precision."""
    traced = example_shape(form.student, list(latent_shapes(form.student).values()))
    seconds: dict[str, float] = {}
    with tqdm(list(form.graphs), desc="exporting", dynamic_ncols=True) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            started = time.perf_counter()
            if precisions[name] != "fp32":
                refuse_overflow(form.graphs[name], STAGES[name], precisions[name], traced)
            export_graph(form.graphs[name], version / f"{name}.onnx", traced)
            seconds[name] = time.perf_counter() - started
    return seconds


def sampler_tables(student: Student) -> dict[str, list[Row]]:
    """NFE count (as text, for JSON) -> rows of the sampler table."""
    described, scheduler = student.description, student.pipeline.scheduler
    return {str(nfe): sampler_table(scheduler, nfe, *described.grid(nfe)) for nfe in described.nfe}


def latent_shapes(student: Student) -> dict[str, tuple[int, ...]]:
    """Size "WxH" -> latent shape, in the student's order. Raises ValueError for a size that its network cannot take."""
    described, shapes = student.description, {}
    step = FAMILIES[described.family].latent_step(student.denoiser.network)
    if described.family == "cogvideox" and len(described.sizes) > 1:
        raise ValueError(
            f"sizes {described.sizes}: a student of videos is exported for one size, its positions are made for it"
        )
    for size in described.sizes:
        width, height = map(int, size.split("x"))
        shape = backbone_of(student.pipeline).latent_shape(student.pipeline, width, height, described.frames)
        if shape[-1] % step or shape[-2] % step:
            pixels = step * width // shape[-1]
            raise ValueError(f"size {size} is not supported by this student, legal: multiples of {pixels} pixels")
        shapes[size] = shape
    return shapes


def describe(
    student: Student, vae: Any, folder: Path, tables: dict[str, list[Row]], precisions: Mapping[GraphName, Precision]
) -> StudentManifest:
    """The manifest of the files in `folder/1`."""
    described, scheduler, version = student.description, student.pipeline.scheduler, folder / "1"
    family = FAMILIES[described.family]
    tokenizers = family.tokenizers(student)
    longest = max(tokenizer.length for tokenizer in tokenizers)
    sizes, chunked = latent_shapes(student), isinstance(vae, AutoencoderKLCogVideoX)
    graphs = [graph for graph in STAGES if (version / f"{graph}.onnx").exists()]
    weights = [name for graph in graphs if (version / (name := weights_of(f"{graph}.onnx"))).exists()]
    files = (*(f"{graph}.onnx" for graph in graphs), *weights, *(tokenizer.file for tokenizer in tokenizers))
    return StudentManifest.model_validate(
        {
            "format": 2,
            "name": folder.name,
            "family": described.family,
            "media_type": "image" if described.frames is None else "video",
            "base": described.base,
            "revision": datetime.date.today().isoformat(),
            "prediction_type": prediction_type(scheduler),
            "solver": solver_name(scheduler),
            "nfe": described.nfe,
            "default_nfe": described.default_nfe,
            "tables": tables,
            "sizes": {size: list(shape) for size, shape in sizes.items()},
            "frames": described.frames,
            "fps": described.fps,
            "chunks": chunks_of(vae, next(iter(sizes.values()))[0]) if chunked else None,
            "tokenizers": [tokenizer.model_dump() for tokenizer in tokenizers],
            "conditions": list(family.conditions),
            "decoder": "tiny" if isinstance(vae, AutoencoderTiny) else "full",
            "max_prompt_characters": max(FEWEST_CHARACTERS, CHARACTERS_PER_TOKEN * longest),
            "max_batch": MAX_BATCH,
            "init_noise_sigma": float(getattr(scheduler, "init_noise_sigma", 1.0)),
            "precision": {graph: precisions[graph] for graph in graphs},
            "k_conditioning": described.k_conditioning,
            "training": described.training,
            "files": {name: sha256(version / name) for name in files},
            "versions": {
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
            },
        }
    )


def bytes_of(graph: Path) -> int:
    """Bytes of a graph's file and of its weights'."""
    weights = graph.with_name(weights_of(graph.name))
    return graph.stat().st_size + (weights.stat().st_size if weights.exists() else 0)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

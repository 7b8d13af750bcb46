"""`fewstep generate`: one picture in this process, without Triton and without HTTP."""

from pathlib import Path
from typing import get_args

from server.engine.engine import Engine, Request
from server.engine.errors import InvalidRequest, StudentError
from server.engine.student import student_folders
from server.gateway.media import encode_now
from server.gateway.schemas import Format
from server.metadata import Metadata, pixel_sha256
from server.trace import trace

FORMATS: dict[str, Format] = {f".{name}": name for name in get_args(Format)} | {".jpg": "jpeg"}


def generate_file(
    prompt: str,
    out: Path,
    seed: int,
    nfe: int | None,
    size: str | None,
    student: str | None,
    repository: Path,
    embed_prompt: bool = False,
    trace_file: Path | None = None,
) -> str:
    """Writes the picture to `out`, and a trace of its stages to `trace_file`; returns a line that says how it was made.

    Raises EngineError or OSError.
    """
    if out.suffix.lower() not in FORMATS:
        raise InvalidRequest(f"--out must end in {', '.join(FORMATS)}, got {out.name!r}", "out")
    engine = open_engine(repository, student)
    nfe = engine.manifest.default_nfe if nfe is None else nfe
    request = Request(prompt, seed, 0, nfe, size or next(iter(engine.manifest.sizes)))
    result = engine.run(request)
    said = Metadata(
        engine.manifest.name,
        prompt if embed_prompt else None,
        seed,
        0,
        nfe,
        request.size,
        result.fingerprint,
        result.fingerprint_parts,
        pixel_sha256(result.image),
    )
    out.write_bytes(encode_now(result.image, FORMATS[out.suffix.lower()], metadata=said).content)
    if trace_file:
        trace_file.write_text(trace(result.spans, f"{engine.manifest.name}, {nfe} NFE, seed {seed}"))
    milliseconds = sum(result.nanoseconds.values()) / 1e6
    return f"{out}: {request.size}, seed {seed}, {request.nfe} NFE, {milliseconds:.1f} ms, {result.fingerprint}"


def open_engine(repository: Path, student: str | None) -> Engine:
    """The named student, or the first. Raises StudentError."""
    return Engine.open(student_folder(repository, student))


def student_folder(repository: Path, student: str | None) -> Path:
    """Of the named student, or of the first. Raises StudentError."""
    folders = student_folders(repository)
    if student is not None and student not in folders:
        raise StudentError(f"{repository} holds no student {student!r}, only {', '.join(folders)}")
    return folders[student or next(iter(folders))]

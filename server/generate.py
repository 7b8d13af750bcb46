"""`fewstep generate`: one picture or video in this process, without Triton and without HTTP."""

from pathlib import Path
from typing import get_args

from server.engine.engine import Engine
from server.engine.errors import InvalidRequest, StudentError
from server.engine.request import Request, Result
from server.engine.student import StudentManifest, read_manifest, student_folders
from server.gateway.media import encode_now
from server.gateway.schemas import Format
from server.gateway.video_media import VideoFormat, write_video
from server.metadata import Metadata, pixel_sha256
from server.trace import trace

PICTURES: dict[str, Format] = {f".{name}": name for name in get_args(Format)} | {".jpg": "jpeg"}
VIDEOS: dict[str, VideoFormat] = {f".{name}": name for name in get_args(VideoFormat)}


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
    """Writes a picture or video to `out`, and a trace of its stages to `trace_file`; returns a line that says how it was made.

    Raises EngineError or OSError.
    """
    engine = Engine.open(folder_for(out, repository, student))
    if embed_prompt and engine.manifest.media_type == "video":
        raise InvalidRequest("--embed-prompt is for pictures; no file of a video holds its prompt", "embed_prompt")
    nfe = engine.manifest.default_nfe if nfe is None else nfe
    request = Request(prompt, seed, 0, nfe, size or next(iter(engine.manifest.sizes)))
    result = engine.run(request)
    out.write_bytes(encoded(engine.manifest, request, result, out.suffix.lower(), embed_prompt))
    if trace_file:
        trace_file.write_text(trace(result.spans, f"{engine.manifest.name}, {nfe} NFE, seed {seed}"))
    milliseconds = sum(result.nanoseconds.values()) / 1e6
    return f"{out}: {request.size}, seed {seed}, {request.nfe} NFE, {milliseconds:.1f} ms, {result.fingerprint}"


def encoded(manifest: StudentManifest, request: Request, result: Result, suffix: str, embed_prompt: bool) -> bytes:
    """The file's bytes."""
    if manifest.fps is not None:
        return write_video(result.image, manifest.fps, VIDEOS[suffix])
    said = Metadata(
        manifest.name,
        request.prompt if embed_prompt else None,
        request.seed,
        request.image_index,
        request.nfe,
        request.size,
        result.fingerprint,
        result.fingerprint_parts,
        pixel_sha256(result.image),
    )
    return encode_now(result.image, PICTURES[suffix], metadata=said).content


def folder_for(out: Path, repository: Path, student: str | None) -> Path:
    """Of the named student, or of the first that makes such a file: .mp4 and .gif are of videos, .webp of either. Raises
    StudentError or InvalidRequest."""
    folders = student_folders(repository) if student is None else {student: student_folder(repository, student)}
    legal: dict[str, None] = {}
    for folder in folders.values():
        suffixes = PICTURES if read_manifest(folder / "1" / "student.json").media_type == "image" else VIDEOS
        if out.suffix.lower() in suffixes:
            return folder
        legal |= dict.fromkeys(suffixes)
    raise InvalidRequest(f"--out must end in {', '.join(legal)} for {' and '.join(folders)}, got {out.name!r}", "out")


def open_engine(repository: Path, student: str | None) -> Engine:
    """The named student, or the first. Raises StudentError."""
    return Engine.open(student_folder(repository, student))


def student_folder(repository: Path, student: str | None) -> Path:
    """Of the named student, or of the first. Raises StudentError."""
    folders = student_folders(repository)
    if student is not None and student not in folders:
        raise StudentError(f"{repository} holds no student {student!r}, only {', '.join(folders)}")
    return folders[student or next(iter(folders))]

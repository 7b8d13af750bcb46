"""Opens an exported student: the manifest is strict, every file is read once and checked against its digest."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError, model_validator

from server.engine.errors import StudentError

GraphName = Literal["text_encoder", "student_step", "vae_decoder"]
GRAPHS: tuple[GraphName, ...] = ("text_encoder", "student_step", "vae_decoder")
FILES = (*(f"{graph}.onnx" for graph in GRAPHS), "tokenizer.json")
MEND = "export the student again with `fewstep export`, or restore the file from git"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
Row = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


class StudentManifest(BaseModel):
    """student.json. Every key is required and none may be added.

    tables: NFE count -> rows (timestep, c0, c1, c2) in the order they run; next = c0*latents + c1*x0 + c2*x0_prev.
    sizes: "WIDTHxHEIGHT" in pixels -> latent shape [C, h, w]; the first is the default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    family: str
    media_type: Literal["image"]
    base: str
    revision: str
    prediction_type: str
    solver: str
    nfe: Annotated[list[PositiveInt], Field(min_length=1)]
    default_nfe: PositiveInt
    tables: dict[str, list[Row]]
    sizes: Annotated[dict[Size, tuple[PositiveInt, PositiveInt, PositiveInt]], Field(min_length=1)]
    text_length: PositiveInt
    max_prompt_characters: PositiveInt
    max_batch: PositiveInt
    init_noise_sigma: Annotated[FiniteFloat, Field(gt=0)]
    precision: dict[GraphName, str]
    k_conditioning: bool
    training: dict[str, Any]
    files: dict[str, Sha256]
    versions: dict[str, str]

    @model_validator(mode="after")
    def agrees_with_itself(self) -> "StudentManifest":
        """Raises ValueError where two fields contradict each other."""
        if self.nfe != sorted(set(self.nfe)) or self.default_nfe not in self.nfe:
            raise ValueError(f"nfe must rise and hold default_nfe, got {self.nfe} and {self.default_nfe}")
        lengths = {nfe: len(rows) for nfe, rows in self.tables.items()}
        if lengths != {str(nfe): nfe for nfe in self.nfe}:
            raise ValueError(f"tables must hold K rows for every K of nfe {self.nfe}, got {lengths}")
        if set(self.files) != set(FILES) or set(self.precision) != set(GRAPHS):
            raise ValueError(f"files must name exactly {', '.join(FILES)} and precision {', '.join(GRAPHS)}")
        return self

    def digest(self) -> str:
        """sha256 of the manifest's contents; white space in the file does not count."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ExportedStudent:
    """A verified student: its manifest and the bytes whose digests were checked (never read a second time)."""

    manifest: StudentManifest
    files: dict[str, bytes]


def open_student(folder: Path) -> ExportedStudent:
    """Reads and verifies `model_repository/<name>`; raises StudentError naming the file and how to mend it."""
    version = folder / "1"
    manifest = read_manifest(version / "student.json")
    if manifest.name != folder.name:
        raise StudentError(f"{folder}: its manifest is named {manifest.name!r}; rename the folder, or {MEND}")
    read(version / "model.py")  # Triton needs it, and says less well that it is missing
    return ExportedStudent(manifest, {name: read_verified(version / name, manifest.files[name]) for name in FILES})


def read_manifest(path: Path) -> StudentManifest:
    """The manifest at `path`; raises StudentError in one line."""
    try:
        return StudentManifest.model_validate_json(read(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise StudentError(f"{path}: {where}: {first['msg']}; {MEND}") from None


def read_verified(path: Path, sha256: str) -> bytes:
    """The bytes of `path`; raises StudentError when they are not those the manifest promises."""
    contents = read(path)
    actual = hashlib.sha256(contents).hexdigest()
    if actual != sha256:
        raise StudentError(f"{path}: sha256 is {actual[:12]}… ({len(contents)} bytes), expected {sha256[:12]}…; {MEND}")
    return contents


def read(path: Path) -> bytes:
    """The bytes of `path`; raises StudentError when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise StudentError(f"{path} is missing; {MEND}") from None
    except OSError as error:
        raise StudentError(f"{path} cannot be read: {error.strerror}; {MEND}") from None


def student_folders(repository: Path) -> dict[str, Path]:
    """Student name -> folder, sorted by name; raises StudentError when there is none."""
    if not repository.is_dir():
        raise StudentError(f"{repository} is no folder; name the model repository with --model-repository")
    folders = {path.name: path for path in sorted(repository.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if not folders:
        raise StudentError(f"{repository} holds no student; publish one with `fewstep export FOLDER --to {repository}`")
    for folder in folders.values():
        read(folder / "config.pbtxt")
    return folders

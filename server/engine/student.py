"""Opens an exported student: the manifest is strict, every file is read once and checked against its digest."""

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator

from server.engine.errors import StudentError

GraphName = Literal["text_encoder", "student_step", "vae_decoder", "vae_decoder_next"]
GRAPHS: tuple[GraphName, ...] = ("text_encoder", "student_step", "vae_decoder")  # of every student
NEXT: GraphName = "vae_decoder_next"  # decodes what follows the first chunk of a video
Precision = Literal["fp32", "fp16", "bf16"]
STAGES: dict[GraphName, str] = {"text_encoder": "text_encoder", "student_step": "denoiser", "vae_decoder": "vae", NEXT: "vae"}
MEND = "export the student again with `fewstep export`, or restore the file from git"

Contents = bytes | bytearray | mmap.mmap
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
Row = tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
TokenizerFile = Literal["tokenizer.json", "tokenizer_2.json", "tokenizer_3.json"]
Condition = Literal["text_emb", "mask", "pooled"]


class GraphTensors(NamedTuple):
    """Names of what goes into a graph and of what comes out, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class TokenizerSettings(BaseModel):
    """How one tokeniser's tokens reach the text encoder: padded to `length` with `pad`.

    masked: whether the text encoder reads where the padding is; truncates: whether it reads only the beginning of a longer
    prompt, which is refused otherwise (Stable Diffusion 3 reads the whole prompt with its third encoder).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: TokenizerFile
    length: PositiveInt
    pad: NonNegativeInt
    masked: bool
    truncates: bool


class StudentManifest(BaseModel):
    """student.json. Every key is required and none may be added.

    tables: NFE count -> rows (timestep, c0, c1, c2) in the order they run; next = c0*latents + c1*x0 + c2*x0_prev.
    sizes: "WIDTHxHEIGHT" in pixels -> latent shape, [C, h, w] of images and [F, C, h, w] of videos; the first is the default.
    frames, fps: of a video in pixels, None for images. chunks: latent frames of a video that are decoded at once, in order (a
    video is decoded alone, chunk by chunk), None for images. conditions: what student_step is told beside the latents. decoder:
    full, or tiny for a distilled one. precision: of the weights and the arithmetic inside each graph; what goes in and comes
    out is float32. k_conditioning: whether student_step is told its NFE count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    family: str
    media_type: Literal["image", "video"]
    base: str
    revision: str
    prediction_type: str
    solver: str
    nfe: Annotated[list[PositiveInt], Field(min_length=1)]
    default_nfe: PositiveInt
    tables: dict[str, list[Row]]
    sizes: Annotated[dict[Size, Annotated[list[PositiveInt], Field(min_length=3, max_length=4)]], Field(min_length=1)]
    frames: PositiveInt | None
    fps: PositiveInt | None
    chunks: Annotated[list[PositiveInt], Field(min_length=1)] | None
    tokenizers: Annotated[list[TokenizerSettings], Field(min_length=1, max_length=3)]
    conditions: Annotated[list[Condition], Field(min_length=1)]
    decoder: Literal["full", "tiny"]
    max_prompt_characters: PositiveInt
    max_batch: PositiveInt
    init_noise_sigma: Annotated[FiniteFloat, Field(gt=0)]
    precision: dict[GraphName, Precision]
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
        expected = self.file_names
        if set(self.files) != set(expected) or set(self.precision) != set(self.graphs):
            raise ValueError(f"files must name exactly {', '.join(expected)} and precision {', '.join(self.graphs)}")
        if len({tokenizer.file for tokenizer in self.tokenizers}) != len(self.tokenizers):
            raise ValueError("tokenizers must name different files")
        video = self.media_type == "video"
        told = (self.frames, self.fps, self.chunks)
        if [value is not None for value in told] != [video] * len(told):
            raise ValueError(f"frames, fps and chunks go with videos alone, got {told} for {self.media_type}")
        if any(len(shape) != 3 + video for shape in self.sizes.values()):
            raise ValueError(f"sizes must have latent shapes of {3 + video} numbers for {self.media_type}s, got {self.sizes}")
        if self.chunks and any(sum(self.chunks) != shape[0] for shape in self.sizes.values()):
            raise ValueError(f"chunks must add up to the latent frames of sizes, got {self.chunks} and {self.sizes}")
        return self

    @property
    def graphs(self) -> tuple[GraphName, ...]:
        """The graphs of this student: NEXT is for videos that have more than one chunk."""
        return (*GRAPHS, NEXT) if self.chunks and len(self.chunks) > 1 else GRAPHS

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files beside student.json that decide the pixels."""
        return (
            *(f"{graph}.onnx" for graph in self.graphs),
            *self.weight_files,
            *(tokenizer.file for tokenizer in self.tokenizers),
        )

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Those that hold the weights of graphs whose weights are large."""
        return tuple(name for graph in self.graphs if (name := weights_of(f"{graph}.onnx")) in self.files)

    @property
    def text_length(self) -> int:
        """Tokens of the longest prompt that is read to its end, marks at its ends included."""
        return max(tokenizer.length for tokenizer in self.tokenizers)

    def tensors(self, graph: GraphName) -> GraphTensors:
        """The tensors that a graph of this student must have."""
        if graph in ("vae_decoder", NEXT):
            before, after = ("state",) if graph == NEXT else (), ("next_state",) if NEXT in self.graphs else ()
            return GraphTensors(("latents", *before), ("image", *after))
        if graph == "student_step":
            counted = ("nfe",) if self.k_conditioning else ()
            told = ("latents", "x0_prev", "timestep", "coefficients", *counted, *self.conditions)
            return GraphTensors(told, ("next_latents", "x0"))
        tokens = [name for place, tokenizer in enumerate(self.tokenizers) for name in token_tensors(place, tokenizer)]
        return GraphTensors(tuple(tokens), tuple(condition for condition in self.conditions if condition != "mask"))

    def digest(self) -> str:
        """sha256 of the manifest's contents; white space in the file does not count."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def weights_of(graph_file: str) -> str:
    """The file beside a graph's own that holds its weights where they are large: vae_decoder.onnx -> vae_decoder.onnx.data."""
    return f"{graph_file}.data"


def token_tensors(place: int, tokenizer: TokenizerSettings) -> list[str]:
    """What the text encoder's inputs from the tokeniser at `place` (0 ..) are called: tokens, tokens_2 .., mask, mask_2 .."""
    number = f"_{place + 1}" if place else ""
    return [f"tokens{number}", *([f"mask{number}"] if tokenizer.masked else [])]


@dataclass(frozen=True)
class ExportedStudent:
    """A verified student: its manifest, the bytes whose digests were checked (never read a second time; large weights stay in
    their files, mapped into memory), and its folder."""

    manifest: StudentManifest
    files: Mapping[str, Contents]
    folder: Path


def open_student(folder: Path) -> ExportedStudent:
    """Reads and verifies `model_repository/<name>`; raises StudentError naming the file and how to mend it."""
    version = folder / "1"
    manifest = read_manifest(version / "student.json")
    if manifest.name != folder.name:
        raise StudentError(f"{folder}: its manifest is named {manifest.name!r}; rename the folder, or {MEND}")
    read(version / "model.py")  # Triton needs it, and says less well that it is missing
    files = {name: open_verified(version / name, manifest.files[name]) for name in manifest.file_names}
    return ExportedStudent(manifest, files, folder)


def read_manifest(path: Path) -> StudentManifest:
    """The manifest at `path`; raises StudentError in one line."""
    try:
        return StudentManifest.model_validate_json(read(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise StudentError(f"{path}: {where}: {first['msg']}; {MEND}") from None


def open_verified(path: Path, sha256: str, mend: str = MEND) -> Contents:
    """The bytes of `path`, of large weights mapped into memory; raises StudentError when they are not those that the manifest
    promises."""
    contents = map_file(path) if path.suffix == ".data" else read(path, mend)
    actual = sha256_of(contents)
    if actual != sha256:
        raise StudentError(f"{path}: sha256 is {actual[:12]}… ({len(contents)} bytes), expected {sha256[:12]}…; {mend}")
    return contents


def map_file(path: Path) -> mmap.mmap:
    """The bytes of `path`, in memory only as far as they are looked at.

    Raises StudentError for a file that goes by another name too: whoever writes there would change it unseen.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise StudentError(f"{path} is a hard link or no plain file; copy the file here, or {MEND}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise StudentError(f"{path} is missing; {MEND}") from None
    except (OSError, ValueError) as error:  # a symbolic link, or an empty file
        raise StudentError(f"{path} cannot be read, or is a link: {error}; {MEND}") from None


def sha256_of(contents: Contents) -> str:
    return hashlib.sha256(contents).hexdigest()


def read(path: Path, mend: str = MEND) -> bytes:
    """The bytes of `path`; raises StudentError when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise StudentError(f"{path} is missing; {mend}") from None
    except OSError as error:
        raise StudentError(f"{path} cannot be read: {error.strerror}; {mend}") from None


def student_folders(repository: Path) -> dict[str, Path]:
    """Student name -> folder: those of images, which are asked most, before those of videos, each kind by name. So the first is
    the default one. Raises StudentError when there is none, or for one that cannot be read."""
    if not repository.is_dir():
        raise StudentError(f"{repository} is no folder; name the model repository with --model-repository")
    folders = {path.name: path for path in sorted(repository.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if not folders:
        raise StudentError(f"{repository} holds no student; publish one with `fewstep export FOLDER --to {repository}`")
    for folder in folders.values():
        read(folder / "config.pbtxt")
    videos = {name: read_manifest(folder / "1" / "student.json").media_type == "video" for name, folder in folders.items()}
    return dict(sorted(folders.items(), key=lambda entry: videos[entry[0]]))

"""One request from prompt to pixels: tokenise, text encoder, NFEs, decoder.

`start`, `step` and `finish` work on a `Progress` that holds all the state of a request, so whoever calls them decides
what runs between two NFEs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from server.engine.errors import InvalidRequest, NumericalError, StudentError
from server.engine.fingerprint import fingerprint
from server.engine.noise import initial_latents
from server.engine.session import OnnxSession, Session
from server.engine.student import GRAPHS, ExportedStudent, StudentManifest, open_student

PAD = 0


@dataclass(frozen=True)
class Request:
    """One image of one request. seed: 0..2^64-1; size: "WxH"."""

    prompt: str
    seed: int
    image_index: int
    nfe: int
    size: str


@dataclass
class Progress:
    """A request under way. Arrays have a batch dimension of 1; table [nfe, 4] float32; nanoseconds by stage."""

    request: Request
    table: npt.NDArray[np.float32]
    tokens: int
    mask: npt.NDArray[np.int64]
    text_emb: npt.NDArray[np.float32]
    latents: npt.NDArray[np.float32]
    x0: npt.NDArray[np.float32]
    nanoseconds: dict[str, int]
    step: int = 0


@dataclass(frozen=True)
class Result:
    """image uint8 [H, W, 3]; nanoseconds by stage, in the order they ran; tokens of the prompt, eos included."""

    image: npt.NDArray[np.uint8]
    nanoseconds: dict[str, int]
    tokens: int
    fingerprint: str


@dataclass(frozen=True)
class Engine:
    """A student ready to run. One call at a time."""

    manifest: StudentManifest
    tokenizer: Tokenizer
    sessions: dict[str, Session]
    fingerprint: str
    tables: dict[int, npt.NDArray[np.float32]] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "Engine":
        """Opens and verifies the student in `folder`; raises StudentError."""
        return cls.of(open_student(folder))

    @classmethod
    def of(cls, student: ExportedStudent) -> "Engine":
        """Builds the sessions of a verified student; raises StudentError."""
        manifest = student.manifest
        sessions: dict[str, Session] = {graph: OnnxSession(graph, student.files[f"{graph}.onnx"]) for graph in GRAPHS}
        tables = {nfe: np.array(manifest.tables[str(nfe)], np.float32) for nfe in manifest.nfe}
        return cls(manifest, open_tokenizer(student.files["tokenizer.json"]), sessions, fingerprint(manifest), tables)

    def run(self, request: Request) -> Result:
        """All stages. Raises InvalidRequest or NumericalError."""
        progress = self.start(request)
        while progress.step < request.nfe:
            self.step(progress)
        return self.finish(progress)

    def start(self, request: Request) -> Progress:
        """Everything before the first NFE. Raises InvalidRequest."""
        self.check(request)
        nanoseconds: dict[str, int] = {}
        with timed(nanoseconds, "tokenise"):
            tokens, mask, length = self.tokenise(request.prompt)
        with timed(nanoseconds, "text_encoder"):
            (text_emb,) = self.sessions["text_encoder"].run({"tokens": tokens, "mask": mask})
        with timed(nanoseconds, "noise"):
            shape = self.manifest.sizes[request.size]
            latents = initial_latents(request.seed, request.image_index, shape, self.manifest.init_noise_sigma)[None]
        x0 = np.zeros_like(latents)
        return Progress(request, self.tables[request.nfe], length, mask, text_emb, latents, x0, nanoseconds)

    def step(self, progress: Progress) -> None:
        """One NFE: replaces latents and x0. Raises NumericalError."""
        row = progress.table[progress.step : progress.step + 1]
        inputs: dict[str, npt.NDArray[Any]] = {
            "latents": progress.latents,
            "x0_prev": progress.x0,
            "timestep": row[:, 0],
            "coefficients": row[:, 1:],
            "nfe": np.array([progress.request.nfe], np.int64),
            "text_emb": progress.text_emb,
            "mask": progress.mask,
        }
        with timed(progress.nanoseconds, f"nfe{progress.step + 1}"):
            latents, x0 = self.sessions["student_step"].run(inputs)
        check_output("x0", x0, progress.x0.shape)
        check_output("latents", latents, progress.latents.shape)
        progress.latents, progress.x0, progress.step = latents, x0, progress.step + 1

    def finish(self, progress: Progress) -> Result:
        """Decodes the latents after the last NFE."""
        with timed(progress.nanoseconds, "vae_decoder"):
            (images,) = self.sessions["vae_decoder"].run({"latents": progress.latents})
        width, height = map(int, progress.request.size.split("x"))
        if images.shape != (1, height, width, 3) or images.dtype != np.uint8:
            raise NumericalError(f"the decoder gave {images.dtype} {images.shape}, expected uint8 {(1, height, width, 3)}")
        return Result(images[0], progress.nanoseconds, progress.tokens, self.fingerprint)

    def check(self, request: Request) -> None:
        """Raises InvalidRequest for what this student was not exported for."""
        limit, nfe, sizes = self.manifest.max_prompt_characters, self.manifest.nfe, self.manifest.sizes
        if not request.prompt.strip() or len(request.prompt) > limit:
            raise InvalidRequest(f"prompt must have 1 to {limit} characters, got {len(request.prompt)}", "prompt")
        if request.nfe not in nfe:
            raise InvalidRequest(f"NFE must be one of {', '.join(map(str, nfe))}, got {request.nfe}", "nfe")
        if request.size not in sizes:
            raise InvalidRequest(f"size must be one of {', '.join(sizes)}, got {request.size!r:.40}", "size")
        if not 0 <= request.seed < 2**64:
            raise InvalidRequest(f"seed must be 0 to {2**64 - 1}, got {request.seed}", "seed")
        if not 0 <= request.image_index < 2**32:
            raise InvalidRequest(f"image_index must be 0 to {2**32 - 1}, got {request.image_index}", "image_index")

    def tokenise(self, prompt: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
        """prompt -> tokens [1, L] int64, mask [1, L] int64, tokens used. Raises InvalidRequest, never truncates."""
        try:
            ids = self.tokenizer.encode(prompt).ids
        except TypeError:  # what the binding makes of a str that has no UTF-8
            raise InvalidRequest("prompt holds a lone surrogate; send valid Unicode", "prompt") from None
        length = self.manifest.text_length
        if len(ids) > length:
            raise InvalidRequest(f"prompt has {len(ids)} tokens, at most {length} are understood (end mark included)", "prompt")
        tokens, mask = np.full((1, length), PAD, np.int64), np.zeros((1, length), np.int64)
        tokens[0, : len(ids)], mask[0, : len(ids)] = ids, 1
        return tokens, mask, len(ids)


@contextmanager
def timed(nanoseconds: dict[str, int], stage: str) -> Iterator[None]:
    """Writes the nanoseconds spent inside to `nanoseconds[stage]`."""
    begin = time.perf_counter_ns()
    yield
    nanoseconds[stage] = time.perf_counter_ns() - begin


def check_output(name: str, values: npt.NDArray[np.float32], shape: tuple[int, ...]) -> None:
    """Raises NumericalError when a step's output has another shape or is not finite."""
    if values.shape != shape or not np.isfinite(values).all():
        raise NumericalError(f"the student's {name} is not finite or not of shape {shape}: no image was made")


def open_tokenizer(contents: bytes) -> Tokenizer:
    """tokenizer.json -> a tokenizer that neither pads nor truncates; raises StudentError."""
    try:
        tokenizer = Tokenizer.from_buffer(contents)
    except Exception as error:  # the binding raises bare Exception
        raise StudentError(f"tokenizer.json cannot be parsed: {error}; export the student again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

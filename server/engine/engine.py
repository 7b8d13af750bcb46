"""A student's three stages on batches of requests: prepare, one NFE, decode.

A `Progress` holds all the state of one image or video, so whoever calls `step` decides what runs between two NFEs and with
whom: rows of a batch may be at different steps and have different NFE counts. See scheduler.py for who does.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from server.engine.clip import Clip
from server.engine.device_runtime import DeviceRuntime
from server.engine.device_step import DeviceStep
from server.engine.errors import NumericalError
from server.engine.fingerprint import fingerprint, fingerprint_parts
from server.engine.noise import initial_latents
from server.engine.provider import Provider, open_sessions, provider_asked_for
from server.engine.request import Floats, Pixels, Progress, Request, Result, Span, check_request
from server.engine.session import Session, Tensors
from server.engine.shapes import DECODE_BATCH, NFE_BATCH
from server.engine.student import NEXT, ExportedStudent, StudentManifest, open_student
from server.engine.text import TextEncoder

NOT_FINITE = "the student's output is not finite: no image was made"
Determinism = Literal["strict", "fast"]


@dataclass(frozen=True)
class Engine:
    """A student ready to run. `prepare` may be called from any thread, everything else by one thread at a time.

    fixed_batch: pads every student_step to this many rows, so that every call has one shape (see batch_policy); nfe_batch:
    the most rows otherwise; device: what its sessions run on, as locks name it.
    """

    manifest: StudentManifest
    text_encoder: TextEncoder
    sessions: dict[str, Session]
    fingerprint: str
    fingerprint_parts: dict[str, str]
    tables: dict[int, Floats] = field(repr=False)
    fixed_batch: int | None = None
    nfe_batch: int = NFE_BATCH
    device: str = "cpu"
    buffers: dict[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path, determinism: Determinism = "strict", provider: Provider | None = None) -> "Engine":
        """Opens and verifies the student in `folder`; raises StudentError."""
        return cls.of(open_student(folder), determinism, provider)

    @classmethod
    def of(
        cls,
        student: ExportedStudent,
        determinism: Determinism = "strict",
        provider: Provider | None = None,
        runtime: DeviceRuntime | None = None,
    ) -> "Engine":
        """Builds the sessions of a verified student; raises StudentError. provider: without one, what $FEWSTEP_PROVIDER says;
        runtime: without one, CUDA, where the provider wants a device."""
        manifest = student.manifest
        opened = open_sessions(student, provider or provider_asked_for(), determinism == "strict", runtime)
        sessions = opened.by_graph
        tables = {nfe: np.array(manifest.tables[str(nfe)], np.float32) for nfe in manifest.nfe}
        text_encoder = TextEncoder.of(student, sessions["text_encoder"])
        policy, fixed_batch = batch_policy(list(sessions.values()), determinism, manifest.max_batch)
        parts = fingerprint_parts(manifest, policy, opened.identity)
        return cls(manifest, text_encoder, sessions, fingerprint(parts), parts, tables, fixed_batch, device=opened.device)

    @property
    def max_batch(self) -> int:
        """Rows that one NFE may have."""
        return self.fixed_batch or min(self.nfe_batch, self.manifest.max_batch)

    @property
    def max_decode_batch(self) -> int:
        """Rows that one decode may have."""
        return 1 if self.fixed_batch or self.manifest.chunks else min(DECODE_BATCH, self.manifest.max_batch)

    def run(self, request: Request) -> Result:
        """One image or video alone, from prompt to pixels. Raises InvalidRequest or NumericalError."""
        progress = self.prepare(request)
        while progress.remaining:
            if error := self.step([progress])[0]:
                raise error
        begin = time.perf_counter_ns()
        (image,) = self.decode(request.size, [progress.latents])
        progress.spans.append(Span("vae_decoder", begin, time.perf_counter_ns() - begin))
        return self.result(progress, image)

    def prepare(self, request: Request) -> Progress:
        """Everything before the first NFE. Raises InvalidRequest."""
        check_request(request, self.manifest)
        begin = time.perf_counter_ns()
        text = self.text_encoder.encode(request.prompt)
        encoded = time.perf_counter_ns()
        shape = tuple(self.manifest.sizes[request.size])
        latents = initial_latents(request.seed, request.image_index, shape, self.manifest.init_noise_sigma)[None]
        drawn = time.perf_counter_ns()
        spans = [Span("text_encoder", begin, encoded - begin), Span("noise", encoded, drawn - encoded)]
        return Progress(request, self.tables[request.nfe], text, latents, np.zeros_like(latents), spans)

    def step(self, batch: Sequence[Progress]) -> list[NumericalError | None]:
        """One NFE of every member: replaces its latents and x0, or says why it cannot go on. All have one size.

        Whatever the session raises leaves every member as it was.
        """
        assert 0 < len(batch) <= self.max_batch
        assert len({member.latents.shape for member in batch}) == 1
        table = np.stack([member.table[member.step] for member in batch])
        rows = {
            "latents": [member.latents for member in batch],
            "x0_prev": [member.x0 for member in batch],
            "timestep": list(table[:, :1]),
            "coefficients": list(table[:, None, 1:]),
        }
        if self.manifest.k_conditioning:
            rows["nfe"] = [np.array([member.request.nfe], np.int64) for member in batch]
        for name in self.manifest.conditions:
            rows[name] = [member.text.conditions[name] for member in batch]
        session = self.sessions["student_step"]
        if isinstance(session, DeviceStep):
            return self.step_on_device(session, batch, rows)
        inputs = {name: self.gather(name, arrays) for name, arrays in rows.items()}
        begin = time.perf_counter_ns()
        outputs = session.run(inputs)
        nanoseconds = time.perf_counter_ns() - begin
        expected = inputs["latents"].shape
        if [output.shape for output in outputs] != [expected, expected]:
            return [NumericalError(f"a step gave shapes {[o.shape for o in outputs]}, expected {expected}") for _ in batch]
        finite = np.logical_and(*(np.isfinite(output[: len(batch)]).reshape(len(batch), -1).all(1) for output in outputs))
        for row, member in enumerate(batch):
            if finite[row]:
                member.latents, member.x0 = (output[row : row + 1] for output in outputs)
                member.step += 1
                member.spans.append(Span(f"nfe{member.step}", begin, nanoseconds, len(batch)))
        return [None if ok else NumericalError(NOT_FINITE) for ok in finite]

    def step_on_device(
        self, session: DeviceStep, batch: Sequence[Progress], rows: dict[str, list[npt.NDArray[Any]]]
    ) -> list[NumericalError | None]:
        """`step` where latents and x0 stay on the device but for those that are decoded next, which alone are looked at."""
        places, wanted = [member.place for member in batch], [member.shown_next for member in batch]
        begin = time.perf_counter_ns()
        outcome = session.step(rows, places, wanted, self.fixed_batch or len(batch))
        nanoseconds = time.perf_counter_ns() - begin
        errors: list[NumericalError | None] = []
        for member, new in zip(batch, outcome, strict=True):
            finite = new.host is None or all(np.isfinite(array).all() for array in new.host)
            errors.append(None if finite else NumericalError(NOT_FINITE))
            if finite:
                member.latents, member.x0 = new.host or (member.latents, member.x0)
                member.step += 1
                member.place = new.place if member.remaining else None
                member.spans.append(Span(f"nfe{member.step}", begin, nanoseconds, len(batch)))
        return errors

    def decode(self, size: str, latents: Sequence[Floats]) -> list[Pixels]:
        """Latents [1, ...] each, last ones or x0 on the way -> uint8 [H, W, 3] each, of a video [F, H, W, 3].

        Raises NumericalError.
        """
        assert 0 < len(latents) <= self.max_decode_batch
        assert len({one.shape for one in latents}) == 1
        if self.manifest.chunks:
            clip = self.clip(size, latents[0])
            while clip.left:
                self.decode_chunk(clip)
            return [clip.video]
        (images,) = self.sessions["vae_decoder"].run({"latents": self.gather("decoded", latents, pad=False)})
        expected = (len(latents), *height_width(size), 3)
        if images.shape != expected or images.dtype != np.uint8:
            raise NumericalError(f"the decoder gave {images.dtype} {images.shape}, expected uint8 {expected}")
        return list(images)

    def clip(self, size: str, latents: Floats) -> Clip:
        """A video that is about to be decoded from latents [1, F, C, h, w]."""
        assert self.manifest.chunks is not None
        assert self.manifest.frames is not None
        return Clip(latents, self.manifest.chunks, (self.manifest.frames, *height_width(size), 3))

    def decode_chunk(self, clip: Clip) -> None:
        """The coming chunk of a video. Between two chunks no other video may be begun: where its state stays on the device,
        there is room for one. Raises NumericalError."""
        told: Tensors = {"latents": clip.coming}
        if clip.state is not None:
            told["state"] = clip.state
        begin = time.perf_counter_ns()
        frames, *state = self.sessions[NEXT if clip.parts else "vae_decoder"].run(told)
        clip.nanoseconds += time.perf_counter_ns() - begin
        clip.begin = clip.begin or begin
        clip.add(frames, state[0] if state else None)

    def result(self, progress: Progress, image: Pixels) -> Result:
        """What is told about a finished request."""
        return Result(image, tuple(progress.spans), progress.text.tokens, self.fingerprint, self.fingerprint_parts)

    def gather(self, name: str, rows: Sequence[npt.NDArray[Any]], pad: bool = True) -> npt.NDArray[Any]:
        """Rows [1, ...] -> [B, ...]: the row itself if it is alone, else a view of a buffer that the next call overwrites."""
        count = max(len(rows), self.fixed_batch or 0) if pad else len(rows)
        if count == 1:
            return rows[0]
        shape = rows[0].shape[1:]
        key = f"{name}{shape}"
        if key not in self.buffers:
            self.buffers[key] = np.empty((max(self.max_batch, self.manifest.max_batch), *shape), rows[0].dtype)
        batch = self.buffers[key][:count]
        for slot in range(count):
            batch[slot] = rows[min(slot, len(rows) - 1)][0]
        return batch


def height_width(size: str) -> tuple[int, int]:
    """Pixels of "WxH"."""
    width, height = map(int, size.split("x"))
    return height, width


def batch_policy(sessions: Sequence[Session], determinism: Determinism, max_batch: int) -> tuple[str, int | None]:
    """How batches are formed: a name for the fingerprint, and the number of rows every step is padded to, if any.

    Sessions whose rows have the same bits in every batch are batched freely. Of others, strict makes every call of one
    shape, which costs a full batch per NFE whoever is there, and is enough where a row's bits depend on the shape alone, which
    `fewstep bench determinism` tells (BLAS on CPUs rounds by slot too); fast pads nothing, and then a request has the same
    bits only when it has its NFEs alone.
    """
    if all(session.batch_invariant for session in sessions):
        return "any", None
    return (f"fixed {max_batch}", max_batch) if determinism == "strict" else ("fast", None)

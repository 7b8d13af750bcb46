"""The seam between HTTP and whatever runs students.

BackendError
├── BackendFailed       it cannot be started: one line for the terminal
├── BackendUnavailable  it died or is starting again: 503, worth retrying
├── BackendTimeout      no answer in time: 504
└── BackendFault        it answered with an error that is nobody's request: 500
InvalidRequest, NumericalError, DeadlineExceeded and ShuttingDown come from the engine as they are.
"""

import json
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from server.engine.errors import DeadlineExceeded, EngineError, InvalidRequest, NumericalError, ShuttingDown, from_wire

# The engine's errors pass through this seam.
__all__ = ["DeadlineExceeded", "EngineError", "InvalidRequest", "NumericalError", "ShuttingDown", "from_wire"]

WARM_UP_PROMPT = "a"
# The W3C trace context of the request being served, for whoever runs it.
TRACEPARENT: ContextVar[str | None] = ContextVar("TRACEPARENT", default=None)


class BackendError(Exception):
    """Base of what goes wrong between the gateway and the students."""


class BackendFailed(BackendError):
    """The backend cannot be started. The message is one line and says the way out."""


class BackendUnavailable(BackendError):
    """The backend is down for now; `retry_after` is in seconds."""

    retry_after = 2


class BackendTimeout(BackendError):
    """The backend gave no answer in time."""


class BackendFault(BackendError):
    """The backend failed on this request. The message is for the log, never for the caller."""


@dataclass(frozen=True)
class GenerationRequest:
    """One image or video of one request to one student. seed: 0..2^64-1; size: "WxH"; previews: after which NFEs
    (1 .. nfe - 1) the x0 prediction is shown; timeout_ms: how long it may take, None for as long as the backend allows; probe:
    our own question whether a student works, counted nowhere; who: the key that asks; keys share the device evenly."""

    student: str
    prompt: str
    seed: int
    image_index: int
    nfe: int
    size: str
    previews: tuple[int, ...] = ()
    timeout_ms: int | None = None
    probe: bool = False
    who: str = ""


@dataclass(frozen=True)
class Span:
    """One stage as the engine ran it: begin on the engine's clock, nanoseconds, rows that shared the call."""

    stage: str
    begin: int
    nanoseconds: int
    batch: int


@dataclass(frozen=True)
class Generated:
    """image uint8 [H, W, 3], of a video [F, H, W, 3]; spans in the order they ran; round_trip is the whole call as the gateway
    saw it."""

    image: npt.NDArray[np.uint8]
    spans: tuple[Span, ...]
    tokens: int
    fingerprint: str
    fingerprint_parts: dict[str, str]
    round_trip: int

    @property
    def nanoseconds(self) -> dict[str, int]:
        """By stage: text_encoder, noise, nfe1 .., vae_decoder; previews are work beside it."""
        return {span.stage: span.nanoseconds for span in self.spans if span.stage != "preview"}


OnPreview = Callable[[int, npt.NDArray[np.uint8]], None]
OnStep = Callable[[int], None]


@dataclass(frozen=True)
class StudentCard:
    """What a backend says about a student. sizes: "WxH" -> latent shape, [C, h, w] of images and [F, C, h, w] of videos, the
    first is the default; frames, fps: of a video in pixels, None for images."""

    name: str
    media_type: str
    family: str
    revision: str
    nfe: tuple[int, ...]
    default_nfe: int
    sizes: dict[str, list[int]]
    frames: int | None
    fps: int | None
    text_length: int
    max_prompt_characters: int
    manifest_sha256: str
    fingerprint: str = ""
    fingerprint_parts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, parameters: dict[str, str]) -> "StudentCard":
        """From the parameters of config.pbtxt, whose values are text or JSON."""
        text = ("name", "media_type", "family", "revision", "manifest_sha256")
        values: dict[str, Any] = {key: value if key in text else json.loads(value) for key, value in parameters.items()}
        return cls(**values | {"nfe": tuple(values["nfe"])})

    @property
    def default_size(self) -> str:
        return next(iter(self.sizes))

    def warm_up(self) -> GenerationRequest:
        """The cheapest request that runs all three graphs."""
        return GenerationRequest(self.name, WARM_UP_PROMPT, 0, 0, self.nfe[0], self.default_size, probe=True)

    def warmed_up(self, made: Generated) -> "StudentCard":
        """The card with what the warm-up has told."""
        return replace(self, fingerprint=made.fingerprint, fingerprint_parts=made.fingerprint_parts)


class Backend(Protocol):
    """Runs students. What takes time is a coroutine."""

    students: dict[str, StudentCard]

    async def start(self) -> None:
        """Returns once every student has made a warm-up image or video. Raises BackendFailed."""
        ...

    async def generate(
        self, request: GenerationRequest, on_preview: OnPreview | None = None, on_step: OnStep | None = None
    ) -> Generated:
        """One image or video.

        on_preview: hears (NFE, uint8 [H, W, 3]) of each preview that was asked for, of a video [f, H, W, 3] with those of its
        first frames that are decoded at once, in order, before it. on_step: hears 1 .. nfe, each as soon as that NFE
        is executed; nothing is decoded for it.

        Cancelling the task stops the work within one NFE. Raises an EngineError or a BackendError.
        """
        ...

    def check_prompt(self, student: str, prompt: str) -> None:
        """Raises InvalidRequest where a student that makes videos would, for who generates later."""
        ...

    def processes(self) -> list[int]:
        """The ids of the processes that run students now."""
        ...

    async def ready(self) -> bool:
        """Whether every student can make something now; asks the students themselves."""
        ...

    async def scrape(self) -> str:
        """What the scheduler counts, and what else the backend does, as Prometheus text. Raises BackendUnavailable."""
        ...

    async def stop(self) -> None:
        """Frees everything; may be called at any time, also twice."""
        ...

    def kill(self) -> None:
        """Ends at once what would outlive this process; called from a signal handler, just before the end."""
        ...

"""The seam between HTTP and whatever runs students.

BackendError
├── BackendFailed       it cannot be started: one line for the terminal
├── BackendUnavailable  it died or is starting again: 503, worth retrying
├── BackendTimeout      no answer in time: 504
└── BackendFault        it answered with an error that is nobody's request: 500
InvalidRequest and NumericalError come from the engine as they are.
"""

import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from server.engine.errors import EngineError, InvalidRequest, NumericalError, from_wire

__all__ = ["EngineError", "InvalidRequest", "NumericalError", "from_wire"]  # the engine's errors pass through this seam

WARM_UP_PROMPT = "a"


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
class ImageRequest:
    """One image of one request to one student. seed: 0..2^64-1; size: "WxH"."""

    student: str
    prompt: str
    seed: int
    image_index: int
    nfe: int
    size: str


@dataclass(frozen=True)
class BackendImage:
    """image uint8 [H, W, 3]; nanoseconds by engine stage; round_trip is the whole call as the gateway saw it."""

    image: npt.NDArray[np.uint8]
    nanoseconds: dict[str, int]
    tokens: int
    fingerprint: str
    round_trip: int


@dataclass(frozen=True)
class StudentCard:
    """What a backend says about a student. sizes: "WxH" -> latent shape [C, h, w], the first is the default."""

    name: str
    media_type: str
    family: str
    revision: str
    nfe: tuple[int, ...]
    default_nfe: int
    sizes: dict[str, list[int]]
    text_length: int
    max_prompt_characters: int
    manifest_sha256: str
    fingerprint: str = ""

    @classmethod
    def parse(cls, parameters: dict[str, str]) -> "StudentCard":
        """From the parameters of config.pbtxt, whose values are text or JSON."""
        text = ("name", "media_type", "family", "revision", "manifest_sha256")
        values: dict[str, Any] = {key: value if key in text else json.loads(value) for key, value in parameters.items()}
        return cls(**values | {"nfe": tuple(values["nfe"])})

    @property
    def default_size(self) -> str:
        return next(iter(self.sizes))

    def warm_up(self) -> ImageRequest:
        """The cheapest request that runs all three graphs."""
        return ImageRequest(self.name, WARM_UP_PROMPT, 0, 0, self.nfe[0], self.default_size)


class Backend(Protocol):
    """Runs students. Everything but `students` is a coroutine, so that a fake is a few lines."""

    students: dict[str, StudentCard]

    async def start(self) -> None:
        """Returns once every student has made a warm-up image. Raises BackendFailed."""
        ...

    async def generate(self, request: ImageRequest) -> BackendImage:
        """One image. Raises InvalidRequest, NumericalError, or a BackendError."""
        ...

    async def ready(self) -> bool:
        """Whether every student can make an image now; asks the students themselves."""
        ...

    async def stop(self) -> None:
        """Frees everything; may be called at any time, also twice."""
        ...

"""What is asked of a student, how far it has come, and what is given back."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.engine.device_step import Place
from server.engine.errors import InvalidRequest
from server.engine.student import StudentManifest
from server.engine.text import Text

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Request:
    """One image or video of one request. seed: 0..2^64-1; size: "WxH"; previews: after which NFEs (1 .. nfe - 1) x0 is shown;
    tells_steps: whether each NFE is told when it is executed; probe: asked by the server itself, to see whether it works; who:
    the key that asks; keys share the device evenly."""

    prompt: str
    seed: int
    image_index: int
    nfe: int
    size: str
    previews: tuple[int, ...] = ()
    tells_steps: bool = False
    probe: bool = False
    who: str = ""


@dataclass(frozen=True)
class Span:
    """One stage of one request: begin on the clock of time.perf_counter_ns, nanoseconds it took, rows that shared the call."""

    stage: str
    begin: int
    nanoseconds: int
    batch: int = 1


@dataclass
class Progress:
    """A request under way. Arrays have a batch dimension of 1; table [nfe, 4] float32.

    place: where its latents and x0 are while they stay on a device. `latents` and `x0` are then older: they are renewed by
    the last NFE, and by those after which x0 is to be shown.
    """

    request: Request
    table: Floats
    text: Text
    latents: Floats
    x0: Floats
    spans: list[Span]
    step: int = 0
    place: Place | None = None

    @property
    def remaining(self) -> int:
        """NFEs still to run."""
        return self.request.nfe - self.step

    @property
    def shown_next(self) -> bool:
        """Whether the outcome of the coming NFE is decoded."""
        return self.remaining == 1 or self.step + 1 in self.request.previews


@dataclass(frozen=True)
class Result:
    """image uint8 [H, W, 3], of a video [F, H, W, 3]; spans in the order they ran; tokens of the prompt, end mark included."""

    image: Pixels
    spans: tuple[Span, ...]
    tokens: int
    fingerprint: str
    fingerprint_parts: dict[str, str]

    @property
    def nanoseconds(self) -> dict[str, int]:
        """Nanoseconds by stage, in the order they ran: text_encoder (tokeniser included), noise, nfe1 .., vae_decoder."""
        return {span.stage: span.nanoseconds for span in self.spans if span.stage != "preview"}


def check_request(request: Request, manifest: StudentManifest) -> None:
    """Raises InvalidRequest for what a student was not exported for."""
    limit, nfe, sizes = manifest.max_prompt_characters, manifest.nfe, manifest.sizes
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
    if any(not 0 < step < request.nfe for step in request.previews):
        raise InvalidRequest(f"previews must be after NFE 1 to {request.nfe - 1}, got {request.previews}", "previews")

"""One image or video under way: its state, whose it is, and where its answers go."""

from dataclasses import dataclass, field
from typing import Protocol

from server.engine.clip import Clip
from server.engine.errors import EngineError
from server.engine.metrics import Metrics
from server.engine.request import Floats, Pixels, Progress, Result


class Sink(Protocol):
    """Where a request's answers go. `done` or `failed` is called exactly once, always from the scheduler's thread."""

    def cancelled(self) -> bool:
        """Asked before each piece of work on the request; True drops it."""
        ...

    def stepped(self, step: int) -> None:
        """NFE `step` (1 ..) is executed; of requests that want to be told."""
        ...

    def preview(self, step: int, image: Pixels) -> None:
        """The x0 prediction after NFE `step`, uint8 [H, W, 3], of a video [F, H, W, 3] with its first frames."""
        ...

    def done(self, result: Result) -> None: ...

    def failed(self, error: EngineError) -> None: ...


@dataclass(eq=False)
class Member:
    """One image or video under way. deadline in seconds of the scheduler's clock; shown: x0 predictions that wait for the
    decoder; clip: the video, or preview of one, whose decoding has begun."""

    progress: Progress
    sink: Sink
    deadline: float
    arrival: int
    submitted: float
    metrics: Metrics
    shown: list[tuple[int, Floats]] = field(default_factory=list)
    clip: Clip | None = None

    @property
    def who(self) -> str:
        """The key that asks."""
        return self.progress.request.who

    @property
    def to_decode(self) -> Floats:
        """The latents of the oldest preview that waits, or the last ones."""
        return self.shown[0][1] if self.shown else self.progress.latents

    @property
    def decodes(self) -> str:
        """The stage that decodes them."""
        return "preview" if self.shown else "vae_decoder"

    @property
    def urgency(self) -> tuple[float, int]:
        return self.deadline, self.arrival

    @property
    def length(self) -> tuple[int, int, tuple[float, int]]:
        """The fewest NFEs left, then the fewest asked for."""
        return self.progress.remaining, self.progress.request.nfe, self.urgency

    @property
    def shape(self) -> tuple[int, ...]:
        return self.progress.latents.shape

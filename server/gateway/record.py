"""What is known of one request while it is served, for its metrics, its log line and its trace."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.gateway.backend import Generated, Span
from server.gateway.media import Encoded


@dataclass
class Record:
    """Filled by whoever comes to know something. Never holds a prompt, a key or pixels. begin: time.perf_counter_ns."""

    begin: int = field(default_factory=time.perf_counter_ns)
    model: str | None = None
    nfe: int | None = None
    seed: int | None = None
    images: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    queue_ms: float | None = None
    status: int | None = None
    code: str | None = None
    gone: bool = False
    error: BaseException | None = None

    def planned(self, model: str, nfe: int, seed: int) -> None:
        """What will be run, once it is known to be legal."""
        self.model, self.nfe, self.seed = model, nfe, seed

    def made(self, image_index: int, image: Generated) -> None:
        """An image the backend has made for this request. Queue: the part of its round trip that is no stage, in the
        slowest image; waiting and the hop to the backend."""
        self.images[image_index] = image.spans
        queue = (image.round_trip - sum(span.nanoseconds for span in image.spans)) / 1e6
        self.queue_ms = max(queue, self.queue_ms or 0.0)

    def encoded(self, image_index: int, file: Encoded) -> None:
        """The image as a file, finished just now."""
        begin = time.perf_counter_ns() - file.nanoseconds
        self.images[image_index] = (*self.images.get(image_index, ()), Span("image_encode", begin, file.nanoseconds, 1))

    def failed(self, status: int, code: str | None) -> None:
        """The error that was answered, also within a stream that began well."""
        self.status, self.code = status, code

    @property
    def outcome(self) -> str:
        """The HTTP status as text, or `cancelled` for a caller who did not wait."""
        if self.gone or self.status == 499:
            return "cancelled"
        if self.status is None or (self.error is not None and self.status < 400):
            return "500"
        return str(self.status)


CURRENT: ContextVar[Record | None] = ContextVar("CURRENT", default=None)


def current() -> Record:
    """The record of the request being served; outside of one, a record that nobody reads."""
    return CURRENT.get() or Record()

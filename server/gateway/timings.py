"""Where the milliseconds of an answer went: stages that sum to the total."""

from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict

from server.gateway.made import Made

MILLION = 1e6


@dataclass(frozen=True)
class Timings:
    """Milliseconds of stages that sum to the total. queue is all that is no named stage: waiting for the device, the hop to the
    backend, noise; steps has one entry per NFE; image_encode makes the file, also that of a video."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # it is also what the OpenAPI document says of an answer's `timings`

    queue: float
    text_encoder: float
    steps: list[float]
    vae_decoder: float
    image_encode: float
    total: float

    def header(self) -> str:
        """The value of Server-Timing."""
        steps = {f"nfe{index}": value for index, value in enumerate(self.steps, 1)}
        stages = {"queue": self.queue, "text_encoder": self.text_encoder, **steps, "vae_decoder": self.vae_decoder}
        stages |= {"image_encode": self.image_encode, "total": self.total}
        return ", ".join(f"{name};dur={value:.3f}" for name, value in stages.items())

    def document(self) -> dict[str, Any]:
        """The value of `timings` in an answer."""
        steps = [round(value, 3) for value in self.steps]
        return {name: round(value, 3) for name, value in vars(self).items() if name != "steps"} | {"steps": steps}


def measure(made: list[Made], total: int) -> Timings:
    """Of several images, the stages of the one that was finished last, since it decided the total (nanoseconds). An image
    that was not made for this request has no stages."""
    last = max(made, key=lambda image: image.round_trip)
    return of_stages(last.nanoseconds, last.file.nanoseconds, total)


def of_stages(spent: dict[str, int], encoded: int, total: int) -> Timings:
    """All in nanoseconds: what the backend spent by stage, what its files took, and the whole."""
    text, decoder = spent.get("text_encoder", 0), spent.get("vae_decoder", 0)
    steps = [spent[name] for name in spent if name.startswith("nfe")]
    queue = total - text - sum(steps) - decoder - encoded
    queue_ms, text_ms, decoder_ms, encode_ms, total_ms = (value / MILLION for value in (queue, text, decoder, encoded, total))
    return Timings(queue_ms, text_ms, [step / MILLION for step in steps], decoder_ms, encode_ms, total_ms)

"""A finished image as the gateway keeps and sends it."""

from dataclasses import dataclass, replace
from typing import Literal

from server.gateway.media import Encoded

Origin = Literal["made", "shared", "cached"]


@dataclass(frozen=True)
class Made:
    """nanoseconds by stage as the engine ran them; round_trip is the whole call to the backend; origin: whether it was made
    for this request, for an equal one that was in flight, or for one before."""

    image_index: int
    file: Encoded
    pixel_sha256: str
    tokens: int
    fingerprint: str
    nanoseconds: dict[str, int]
    round_trip: int
    origin: Origin = "made"

    def of_another(self, origin: Origin) -> "Made":
        """The same image for a request that ran no stage for it: all its time is waiting."""
        return replace(self, file=Encoded(self.file.content, 0), nanoseconds={}, round_trip=0, origin=origin)

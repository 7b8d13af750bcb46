"""What a comparison of an exported graph with PyTorch found: how large the differences are, and how large they may be."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.engine.student import GraphName, Precision


class Tolerance(NamedTuple):
    """largest: of latents and embeddings, see largest_difference; levels: of pixels, of 255."""

    largest: float
    levels: int


# A level either way is a rounding edge. Half precisions: 40 times the rounding of one operation, and what that makes of pixels.
FLOAT32, FLOAT16, BFLOAT16 = Tolerance(1e-4, 1), Tolerance(40 * 2**-11, 3), Tolerance(40 * 2**-8, 11)
AGAINST_FLOAT32: dict[Precision, Tolerance] = {"fp32": FLOAT32, "fp16": FLOAT16, "bf16": BFLOAT16}
IN_ITS_OWN: dict[Precision, Tolerance] = AGAINST_FLOAT32 | {"bf16": FLOAT16}  # computed in float32; only constants are rounded
Against = Literal["eager", "float32", "itself", "diffusers"]


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, the largest difference, and the most that is tolerated.

    Differences are absolute, of floats whose largest is above 1 as a share of that. mean: the mean difference; graph: the graph
    it is about, None for all three together; against: what the exported graphs were compared with, eager and diffusers in
    their own precision; levels: differences are levels of 255.
    """

    what: str
    error: float
    tolerance: float
    mean: float = 0.0
    graph: GraphName | None = None
    against: Against = "eager"
    levels: bool = False

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


class Distance(NamedTuple):
    """Absolute differences between two arrays."""

    largest: float
    mean: float


class Pictures(NamedTuple):
    """latents float32 [B, C, h, w] and images uint8 [B, H, W, 3]; of videos with frames after the batch."""

    latents: NDArray[Any]
    images: NDArray[Any]


@dataclass(frozen=True)
class Trajectory:
    """The same prompts and noise at one K by the exported graphs and by the diffusers pipeline with the eager decoder.

    size: "WxH" where it is not the student's default; precision: the coarsest of the graphs; half, float32: of a student in
    half precision, what it makes and what it makes in float32.
    """

    nfe: int
    size: str
    exported: Pictures
    eager: Pictures
    precision: Precision = "fp32"
    half: Pictures | None = None
    float32: Pictures | None = None

    def checks(self) -> list[Check]:
        """Latents and pictures, each against diffusers, and of a half-precision student against itself in float32."""
        named = f"{self.nfe} exported steps equal the diffusers pipeline{self.size and f' at {self.size}'}"
        checks = self.compared(named, self.exported, self.eager, "diffusers")
        if self.half is not None and self.float32 is not None:
            named = f"{self.nfe} steps in {self.precision} against float32{self.size and f' at {self.size}'}"
            checks += self.compared(named, self.half, self.float32, "float32")
        return checks

    def compared(self, named: str, ours: Pictures, theirs: Pictures, against: Against) -> list[Check]:
        """Two checks: of latents and of pictures."""
        latents = largest_difference([ours.latents], [theirs.latents], scaled=True)
        images = largest_difference([ours.images], [theirs.images])
        allowed = tolerance(self.precision, against)
        return [
            Check(named, latents.largest, allowed.largest, latents.mean, against=against),
            Check(f"{named}, decoded", images.largest, allowed.levels, images.mean, against=against, levels=True),
        ]


@dataclass(frozen=True)
class Proof:
    """Everything that was compared, and the trajectories of every K to be looked at."""

    checks: tuple[Check, ...]
    trajectories: tuple[Trajectory, ...]


def coarsest(precisions: Iterable[Precision]) -> Precision:
    """The precision that rounds most."""
    return max(precisions, key=AGAINST_FLOAT32.__getitem__)


def tolerance(precision: Precision, against: Against) -> Tolerance:
    """What a comparison may differ by."""
    return AGAINST_FLOAT32[precision] if against == "float32" else IN_ITS_OWN[precision]


def compared(
    named: str, ours: list[NDArray[Any]], theirs: list[NDArray[Any]], graph: GraphName, precision: Precision, against: Against
) -> Check:
    """Outputs of a graph and of its reference."""
    levels = theirs[0].dtype == np.uint8
    worst = largest_difference(ours, theirs, scaled=not levels)
    allowed = tolerance(precision, against)
    return Check(named, worst.largest, allowed.levels if levels else allowed.largest, worst.mean, graph, against, levels)


def largest_difference(ours: list[NDArray[Any]], theirs: list[NDArray[Any]], scaled: bool = False) -> Distance:
    """Over all outputs; numpy's maximum, because Python's loses a NaN that does not come first.

    scaled: in units of each output's largest value where that is above 1, since rounding grows with it.
    """
    assert all(one.shape == other.shape for one, other in zip(ours, theirs, strict=True))
    differences = [np.abs(one.astype(np.float64) - other) for one, other in zip(ours, theirs, strict=True)]
    if scaled:
        differences = [d / max(1.0, float(np.abs(other).max())) for d, other in zip(differences, theirs, strict=True)]
    return Distance(float(np.max([d.max() for d in differences])), float(np.mean([d.mean() for d in differences])))

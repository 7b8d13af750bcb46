"""Clips: one shape on a plain background that moves, grows, shrinks, turns or rests, drawn from an integer seed.

A clip is decided by its seed alone. Combinations of (shape, colour, background, motion) that are held out are never trained
on: a model has seen red stars and stars that fall, but no red star that falls on a yellow background.
"""

from dataclasses import dataclass

import numpy as np

from tdm_train.scenes.world import BACKGROUNDS, COLOURS, OBJECT_COLOURS, SHAPES, Item, Split, paint

FRAMES = 16
FPS = 8
FRAME_SIZE = 64
SIZES = {"small": 0.11, "medium": 0.16, "large": 0.22}  # radius in the first frame, as a share of the frame's width
DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "upper left": (-1, -1),
    "upper right": (1, -1),
    "lower left": (-1, 1),
    "lower right": (1, 1),
}
MOTIONS = (*DIRECTIONS, "grow", "shrink", "turn", "rest")
SPEEDS = ("slow", "fast")
# What happens from the first frame to the last, slow and fast: the way gone as a share of the frame's width, the factor
# on the radius, the radians turned.
DISTANCE, GROWTH, TURN = (0.2, 0.4), (1.35, 1.9), (np.pi / 3, np.pi)
ROUND = ("circle", "ring")  # these turn unseen, so they never do
SIZE_JITTER, SPEED_JITTER = 0.05, 0.1
REACH = 1.2  # how far a shape reaches from its centre at most, in radii
# Everything that can be said of a clip, with its possible values. A clip at rest has no speed.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": OBJECT_COLOURS,
    "size": tuple(SIZES),
    "background": BACKGROUNDS,
    "motion": MOTIONS,
    "speed": SPEEDS,
}


@dataclass(frozen=True)
class Clip:
    """One moving object. `x`, `y` and `radius` hold for the first frame, as shares of the frame's width from the top left;
    until the last frame it goes by (`dx`, `dy`), its radius is multiplied by `growth` and it turns by `turned` radians."""

    shape: str
    colour: str
    size: str
    background: str
    motion: str
    speed: str | None
    x: float
    y: float
    radius: float
    dx: float = 0.0
    dy: float = 0.0
    growth: float = 1.0
    turned: float = 0.0


def is_held_out(shape: str, colour: str, background: str, motion: str) -> bool:
    """Whether this combination is kept for evaluation: one in thirty, spread so that every two or three of its four values
    are trained on together."""
    shape_index, colour_index = SHAPES.index(shape), OBJECT_COLOURS.index(colour)
    one_in_ten = (shape_index + 2 * colour_index + 3 * BACKGROUNDS.index(background)) % 10 == 0
    return one_in_ten and MOTIONS.index(motion) % 3 == (shape_index + colour_index) % 3


def draw_clip(seed: int, split: Split = "train") -> Clip:
    """Draws a clip from `seed` (0 .. 2^63 - 1): the same seed and split give the same clip on every machine."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 2 if split == "train" else 3]))
    while True:
        clip = _draw(rng)
        if is_held_out(clip.shape, clip.colour, clip.background, clip.motion) == (split == "held_out"):
            return clip


def _draw(rng: np.random.Generator) -> Clip:
    background, shape, size = _pick(BACKGROUNDS, rng), _pick(SHAPES, rng), _pick(tuple(SIZES), rng)
    colour = _pick(tuple(colour for colour in OBJECT_COLOURS if colour != background), rng)
    motion = _pick(tuple(motion for motion in MOTIONS if motion != "turn" or shape not in ROUND), rng)
    fast = int(rng.integers(2))
    radius = SIZES[size] * (1 + SIZE_JITTER * rng.uniform(-1, 1))
    course = _course(motion, fast, rng)
    margin = min(REACH * radius * max(course.get("growth", 1.0), 1.0), 0.5)  # what grows beyond that stays in the middle
    x, y = (_start(margin, course.get(way, 0.0), rng) for way in ("dx", "dy"))
    speed = None if motion == "rest" else SPEEDS[fast]
    return Clip(shape, colour, size, background, motion, speed, x, y, radius, **course)


def _start(margin: float, way: float, rng: np.random.Generator) -> float:
    """Where to begin, so that the centre keeps `margin` from both edges to the end of the way."""
    lowest, highest = margin - min(way, 0.0), 1 - margin - max(way, 0.0)
    return rng.uniform(lowest, max(highest, lowest))


def _course(motion: str, fast: int, rng: np.random.Generator) -> dict[str, float]:
    """What changes until the last frame, as fields of Clip."""
    amount = 1 + SPEED_JITTER * rng.uniform(-1, 1)
    if motion in DIRECTIONS:
        across, down = DIRECTIONS[motion]
        distance = amount * DISTANCE[fast] / np.hypot(across, down)
        return {"dx": across * distance, "dy": down * distance}
    if motion in ("grow", "shrink"):
        growth = GROWTH[fast] ** amount
        return {"growth": growth if motion == "grow" else 1 / growth}
    if motion == "turn":
        return {"turned": amount * TURN[fast] * float(rng.choice((-1, 1)))}
    return {}


def _pick(values: tuple[str, ...], rng: np.random.Generator) -> str:
    return values[rng.integers(len(values))]


def render_clip(clip: Clip) -> np.ndarray:
    """Renders a clip as uint8 [16, 64, 64, 3]; edges are antialiased over one pixel."""
    frames = np.empty((FRAMES, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    frames[:] = COLOURS[clip.background]
    for frame, progress in zip(frames, np.linspace(0, 1, FRAMES), strict=True):
        x, y, radius = clip.x + progress * clip.dx, clip.y + progress * clip.dy, clip.radius * clip.growth**progress
        paint(frame, Item(clip.shape, clip.colour, clip.size, x, y, radius), progress * clip.turned)
    return frames


def render_clips(clips: list[Clip]) -> np.ndarray:
    """Renders clips as uint8 [len(clips), 16, 64, 64, 3]."""
    return np.stack([render_clip(clip) for clip in clips])

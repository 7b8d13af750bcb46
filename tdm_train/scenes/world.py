"""Scenes: one or two shapes on a plain background, drawn from an integer seed and rendered with antialiasing.

A scene is decided by its seed alone. Scenes that contain a held-out combination of (shape, colour, size, background) are
never trained on: a model has seen small red stars and yellow backgrounds, but no small red star on a yellow background.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

IMAGE_SIZE = 128
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (250, 140, 22),
    "yellow": (250, 219, 40),
    "green": (44, 160, 60),
    "blue": (40, 84, 214),
    "purple": (134, 52, 168),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "grey": (140, 140, 140),
}
OBJECT_COLOURS = tuple(COLOURS)[:8]
BACKGROUNDS = tuple(COLOURS)
SIZES = {"small": 0.09, "medium": 0.13, "large": 0.18}  # radius as a share of the image's width
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
# How the objects lie: one object in one of nine places, a pair side by side in a row, or a pair stacked in a column.
LAYOUTS = (
    *(f"{row} {column}" for row in ROWS for column in COLUMNS),
    *(f"side by side, {row} row" for row in ROWS),
    *(f"stacked, {column} column" for column in COLUMNS),
)
CENTRES = (0.24, 0.5, 0.76)
POSITION_JITTER = 0.05
SIZE_JITTER = 0.05
Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Item:
    """One object of a scene: `x`, `y` and `radius` are shares of the image's width, the origin is the top left."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two items (left before right, top before bottom), their layout (one of LAYOUTS) and the background."""

    items: tuple[Item, ...]
    layout: str
    background: str


def is_held_out(shape: str, colour: str, size: str, background: str) -> bool:
    """Whether this combination is kept for evaluation: one in thirty, spread so that every two or three of its four values
    are trained on together."""
    shape_index, colour_index = SHAPES.index(shape), OBJECT_COLOURS.index(colour)
    one_in_ten = (shape_index + 2 * colour_index + 3 * BACKGROUNDS.index(background)) % 10 == 0
    return one_in_ten and tuple(SIZES).index(size) == (shape_index + colour_index) % 3


def draw_scene(seed: int, split: Split = "train") -> Scene:
    """Draws a scene from `seed` (0 .. 2^63 - 1): the same seed and split give the same scene on every machine."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0 if split == "train" else 1]))
    while True:
        scene = _draw(rng)
        held_out = any(is_held_out(item.shape, item.colour, item.size, scene.background) for item in scene.items)
        if held_out == (split == "held_out"):
            return scene


def _draw(rng: np.random.Generator) -> Scene:
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    pair = rng.random() < 0.6
    layout = LAYOUTS[rng.integers(9, 15)] if pair else LAYOUTS[rng.integers(9)]
    jitter = rng.uniform(-1, 1, size=(2, 3))
    items = tuple(_draw_item(rng, background, centre, jitter[slot]) for slot, centre in enumerate(_layout_centres(layout)))
    return Scene(items, layout, background)


def _layout_centres(layout: str) -> tuple[tuple[float, float], ...]:
    index = LAYOUTS.index(layout)
    if index < 9:
        return ((CENTRES[index % 3], CENTRES[index // 3]),)
    if index < 12:
        return ((CENTRES[0], CENTRES[index - 9]), (CENTRES[2], CENTRES[index - 9]))
    return ((CENTRES[index - 12], CENTRES[0]), (CENTRES[index - 12], CENTRES[2]))


def _draw_item(rng: np.random.Generator, background: str, centre: tuple[float, float], jitter: np.ndarray) -> Item:
    shape, size = SHAPES[rng.integers(len(SHAPES))], tuple(SIZES)[rng.integers(len(SIZES))]
    colours = [colour for colour in OBJECT_COLOURS if colour != background]
    return Item(
        shape,
        colours[rng.integers(len(colours))],
        size,
        x=centre[0] + POSITION_JITTER * jitter[0],
        y=centre[1] + POSITION_JITTER * jitter[1],
        radius=SIZES[size] * (1 + SIZE_JITTER * jitter[2]),
    )


def render(scene: Scene, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Renders a scene as uint8 [image_size, image_size, 3]; edges are antialiased over one pixel."""
    image = np.empty((image_size, image_size, 3), np.uint8)
    image[:] = COLOURS[scene.background]
    for item in scene.items:
        paint(image, item)
    return image


def paint(image: np.ndarray, item: Item, turned: float = 0.0) -> None:
    """Paints one item, turned clockwise by `turned` radians about its centre, over a uint8 image [S, S, 3], in place."""
    size = image.shape[0]
    cx, cy, radius = item.x * size, item.y * size, item.radius * size
    reach = 1.2 * radius + 1
    x0, x1 = max(int(cx - reach), 0), min(int(cx + reach) + 2, size)
    y0, y1 = max(int(cy - reach), 0), min(int(cy + reach) + 2, size)
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5 - cx)
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - cy)
    if turned:
        cosine, sine = np.float32(np.cos(turned)), np.float32(np.sin(turned))
        x, y = cosine * x + sine * y, cosine * y - sine * x
    coverage = np.clip(0.5 - _signed_distance(item.shape, x, y, radius), 0, 1)[:, :, None]
    window = image[y0:y1, x0:x1].astype(np.float32)
    image[y0:y1, x0:x1] = np.rint(window + coverage * (np.asarray(COLOURS[item.colour], np.float32) - window))


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Pixels from each point to the shape's edge, negative inside; y points down, the shape's centre is (0, 0)."""
    r = np.float32(radius)
    match shape:
        case "circle":
            return np.hypot(x, y) - r
        case "ring":
            return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
        case "cross":
            ax, ay, long, short = np.abs(x), np.abs(y), 0.98 * r, 0.32 * r
            return np.minimum(np.maximum(ax - long, ay - short), np.maximum(ax - short, ay - long))
        case "triangle":
            side = 1.2 * r  # circumradius; shifted down by a quarter so that the box around it is centred
            y = y - 0.25 * side
            return np.maximum(y - side / 2, np.abs(x) * np.float32(3**0.5 / 2) - y / 2 - side / 2)
        case "star":
            return _star_distance(x, y, 1.18 * r)
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def _star_distance(x: np.ndarray, y: np.ndarray, tip: float) -> np.ndarray:
    """Five points: the plane is folded onto half of one point, whose edge runs from the tip to an inner corner."""
    fifth, inner = 2 * np.pi / 5, 0.45 * tip
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    rho = np.hypot(x, y)
    along, across = rho * np.cos(angle), rho * np.sin(angle)
    normal = np.array([inner * np.sin(fifth / 2), tip - inner * np.cos(fifth / 2)])
    normal /= np.linalg.norm(normal)
    return ((along - tip) * normal[0] + across * normal[1]).astype(np.float32)


def render_batch(scenes: list[Scene], image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Renders scenes as uint8 [len(scenes), image_size, image_size, 3]."""
    return np.stack([render(scene, image_size) for scene in scenes])

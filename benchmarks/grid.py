"""A picture of the first captions and of what every row of an evaluation made of them, for people to look at."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.evaluation import Row

FRAMES = 4  # of a clip: the first, the last, and as many evenly between them
GAP, HEAD = 6, 34
CHARACTERS, CHARACTER_WIDTH = 34, 6  # of a line of a caption, in the pen's own font


def draw_grid(rows: Sequence[Row], captions: Sequence[str], file: Path, lines: int = 12) -> None:
    """One line per caption, one column per row of the result, names above and captions beside; of clips a strip of frames."""
    cells = [[cell(picture) for picture in row.pictures[:lines]] for row in rows]
    height, width = (side + GAP for side in cells[0][0].shape[:2])
    margin = CHARACTERS * CHARACTER_WIDTH + 2 * GAP
    canvas = Image.new("RGB", (margin + len(rows) * width, HEAD + len(cells[0]) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for column, row in enumerate(rows):
        left = margin + column * width
        pen.multiline_text((left, 3), name(row), fill="black")
        for line, made in enumerate(cells[column]):
            canvas.paste(Image.fromarray(made), (left, HEAD + line * height))
    for line, caption in enumerate(captions[: len(cells[0])]):
        pen.multiline_text((GAP, HEAD + line * height + height // 4), fill(caption, CHARACTERS), fill="black")
    canvas.quantize(256).save(file)


def cell(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of a picture; frames of a clip [F, H, W, 3] side by side, [H, FRAMES * W, 3]."""
    if picture.ndim == 3:
        return picture
    return np.concatenate(list(picture[np.linspace(0, len(picture) - 1, FRAMES).round().astype(int)]), axis=1)


def name(row: Row) -> str:
    if row.nfe == 0:
        return row.what
    return f"{row.what}, {row.nfe} NFE" + (f"\nguidance {row.guidance:g}" if row.guidance != 1 else "")

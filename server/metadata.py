"""What a PNG made by fewstep says of itself: enough to make it again. The prompt is there only if that was asked for."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

CHUNK = "fewstep"  # the keyword of the PNG's iTXt chunk
FORMAT = 1


@dataclass(frozen=True)
class Metadata:
    """One image. pixel_sha256 is over uint8 [H, W, 3]; prompt is None unless it was to be embedded."""

    model: str
    prompt: str | None
    seed: int
    image_index: int
    num_inference_steps: int
    size: str
    fingerprint: str
    fingerprint_parts: dict[str, str]
    pixel_sha256: str

    def text(self) -> dict[str, str]:
        """Keyword and value of a PNG's text."""
        return {CHUNK: json.dumps({"format": FORMAT, **asdict(self)})}


def pixel_sha256(image: npt.NDArray[np.uint8]) -> str:
    """Hexadecimal sha256 of uint8 [H, W, 3], row by row, whatever the file format."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def read_metadata(file: Path) -> tuple[Metadata, npt.NDArray[np.uint8]]:
    """The metadata and pixels of a PNG. Raises ValueError when it is none that fewstep made."""
    try:
        with Image.open(file) as picture:
            text: Any = getattr(picture, "text", {}).get(CHUNK)
            pixels = np.asarray(picture.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"{file} is no picture") from None
    if text is None:
        raise ValueError(f"{file} has no fewstep metadata: it is no PNG made by fewstep, or a program took the metadata out")
    fields = json.loads(text)
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
        raise ValueError(f"{file} has fewstep metadata of another format; this version reads {FORMAT}")
    try:
        return Metadata(**fields), pixels
    except TypeError:
        raise ValueError(f"{file} has damaged fewstep metadata") from None

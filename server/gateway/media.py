"""Pixels -> bytes of a file, on threads of their own so that the event loop stays free."""

import asyncio
import io
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from server.gateway.schemas import Format
from server.metadata import Metadata

DEFAULT_COMPRESSION = 95
PNG_LEVEL = 1  # zlib's fastest: a few per cent larger, several times quicker
THREADS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")


@dataclass(frozen=True)
class Encoded:
    """The bytes of an image file, and the nanoseconds it took to make them."""

    content: bytes
    nanoseconds: int


async def encode(
    image: npt.NDArray[np.uint8], format: Format, compression: int | None, metadata: Metadata | None = None
) -> Encoded:
    """image uint8 [H, W, 3] -> file. compression 0..100 is the quality of jpeg and webp; metadata is kept in png alone."""
    return await asyncio.get_running_loop().run_in_executor(THREADS, encode_now, image, format, compression, metadata)


def encode_now(
    image: npt.NDArray[np.uint8], format: Format, compression: int | None = None, metadata: Metadata | None = None
) -> Encoded:
    """`encode` on the calling thread."""
    begin = time.perf_counter_ns()
    quality = DEFAULT_COMPRESSION if compression is None else compression
    options: dict[str, Any] = {"compress_level": PNG_LEVEL} if format == "png" else {"quality": quality}
    if format == "png" and metadata:
        options["pnginfo"] = metadata.chunk()
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, **options)
    return Encoded(file.getvalue(), time.perf_counter_ns() - begin)

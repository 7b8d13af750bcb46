"""Pixels -> bytes of a file by the fastest encoder of each format, without holding up the event loop."""

import asyncio
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from server.gateway.png import write_png
from server.gateway.schemas import Format
from server.metadata import Metadata

BEST = 100  # of output_compression, and its default
FULL_CHROMA = 90  # from this quality on a jpeg keeps the colour of every pixel (4:4:4), as libvips does
TINY = 128 * 128  # pixels up to which a png or jpeg is made in less time than the event loop would need to wait for it
THREADS = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="encode")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Encoded:
    """The bytes of an image file, and the nanoseconds it took to make them."""

    content: bytes
    nanoseconds: int


async def encode(
    image: npt.NDArray[np.uint8], format: Format, compression: int | None, metadata: Metadata | None = None
) -> Encoded:
    """image uint8 [H, W, 3] -> file. compression 0..100 is the quality of jpeg and webp, at 100 webp is lossless; metadata
    is kept in png alone."""
    return await beside(image, format, lambda: encode_now(image, format, compression, metadata))


async def beside(image: npt.NDArray[np.uint8], format: Format, work: Callable[[], Result]) -> Result:
    """The result of `work`, which encodes `image`: on a thread, or at once where a thread would cost more than it frees."""
    if image.shape[0] * image.shape[1] <= TINY and format != "webp":
        return work()
    return await asyncio.get_running_loop().run_in_executor(THREADS, work)


def encode_now(
    image: npt.NDArray[np.uint8], format: Format, compression: int | None = None, metadata: Metadata | None = None
) -> Encoded:
    """`encode` on the calling thread."""
    begin = time.perf_counter_ns()
    quality = BEST if compression is None else compression
    if format == "png":
        content = write_png(image, metadata.text() if metadata else {})
    elif format == "jpeg":
        content = write_jpeg(image, quality)
    else:
        content = write_webp(image, quality)
    return Encoded(content, time.perf_counter_ns() - begin)


def write_jpeg(image: npt.NDArray[np.uint8], quality: int) -> bytes:
    """By libjpeg-turbo through simplejpeg, which lets other threads run meanwhile; Pillow does not."""
    subsampling = "444" if quality >= FULL_CHROMA else "420"
    content: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", subsampling)
    return content


def write_webp(image: npt.NDArray[np.uint8], quality: int) -> bytes:
    """Lossless at quality 100. Method 0 takes half the time of Pillow's 4; a lossless file's quality is effort, here none."""
    file = io.BytesIO()
    lossless = quality == BEST
    Image.fromarray(image).save(file, "webp", lossless=lossless, quality=0 if lossless else quality, method=0)
    return file.getvalue()

"""What a picture's file costs: encoders side by side, whether they free the interpreter, and what JSON adds.

Candidates that are not installed are left out; `pip install imagecodecs opencv-python-headless fpng pyvips[binary] zlib-ng
deflate` brings the others. Rounds are interleaved over all candidates, so that a machine that slows down slows all alike:
read the ratios. "held" is the longest share of an encoding for which an event loop beside it did not turn, while no thread
was forced to let go: near 1 means that the encoder keeps the interpreter to itself.
"""

import asyncio
import base64
import importlib
import io
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from server.engine.fingerprint import device_class
from server.engine.request import Request
from server.gateway.json_answer import to_base64, to_json
from server.gateway.media import encode_now
from server.gateway.png import chunk, write_png
from server.generate import open_engine

Pixels = npt.NDArray[np.uint8]
Encoder = Callable[[Pixels], bytes]
PACKAGES = ("pillow", "isal", "simplejpeg", "imagecodecs", "opencv-python-headless", "fpng", "pyvips", "zlib-ng", "deflate")
PROMPT = "a large yellow star on a purple background"
OURS = "fewstep"
HELD_ROUNDS = 5


def run(repository: Path, student: str | None, rounds: int, sides: list[int]) -> None:
    """Measures, prints a table per picture, and one line of JSON last. Raises EngineError."""
    engine = open_engine(repository, student)
    scene = engine.run(Request(PROMPT, 7, 0, max(engine.manifest.nfe), next(iter(engine.manifest.sizes)))).image
    pictures = {f"student {scene.shape[1]}": scene}
    for side in sides:
        pictures |= {f"photo {side}": photo(side), f"flat {side}": flat(side)}
    found = candidates()
    rows = [row for name, image in pictures.items() for row in measure(name, image, found, rounds)]
    largest = list(pictures.values())[-2]
    document = {
        "benchmark": "encoders",
        "student": engine.manifest.name,
        "fingerprint": engine.fingerprint,
        "device": device_class(),
        "rounds": rounds,
        "versions": {name: known for name in PACKAGES if (known := installed(name))},
        "rows": rows,
        "held": {key: asyncio.run(held(encoder, largest)) for key, encoder in flatten(found).items()},
        "hop_ms": round(asyncio.run(hop()), 4),
        "json_ms": {name: answer(encode_now(image, "png").content, rounds) for name, image in pictures.items()},
    }
    report(document)
    print(json.dumps(document))


def photo(side: int) -> Pixels:
    """Like a photograph: amplitudes that fall with the frequency, colours that agree with each other, sensor noise."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    light, hue = (np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side))) / frequency**1.1, (side, side)) for _ in range(2))
    channels = [light / light.std() + tint * hue / hue.std() for tint in (0.3, 0.0, -0.3)]
    return np.clip(128 + 50 * np.stack(channels, -1) + rng.normal(0, 1.5, (side, side, 3)), 0, 255).astype(np.uint8)


def flat(side: int) -> Pixels:
    """A disc and a box on one colour."""
    y, x = np.mgrid[:side, :side] / side
    image = np.full((side, side, 3), 200, np.uint8)
    image[np.hypot(x - 0.5, y - 0.3) < 0.2] = (220, 30, 30)
    image[(x < 0.3) & (y > 0.6)] = (20, 60, 200)
    return image


def candidates() -> dict[str, dict[str, Encoder]]:
    """Format -> name -> encoder; ours is what the gateway does, jpeg and webp at quality 95."""
    found: dict[str, dict[str, Encoder]] = {
        "png": {OURS: lambda image: write_png(image, {})}
        | {f"pillow, level {k}": pillow("png", compress_level=k) for k in (1, 6)},
        "jpeg": {OURS: ours("jpeg", 95), "pillow": pillow("jpeg", quality=95, subsampling=0)},
        "webp": {OURS: ours("webp", 95)} | {f"pillow, method {k}": pillow("webp", quality=95, method=k) for k in (2, 4)},
        "webp lossless": {OURS: ours("webp", 100)}
        | {
            f"pillow, effort {q}, method {k}": pillow("webp", lossless=True, quality=q, method=k) for q, k in ((20, 1), (80, 4))
        },
    }
    found["png"]["pillow, level 1, run lengths"] = pillow("png", compress_level=1, compress_type=3)
    if deflate := optional("deflate"):
        found["png"]["libdeflate, level 1"] = filtered(lambda rows: bytes(deflate.zlib_compress(rows.tobytes(), 1)))
    if zlib_ng := optional("zlib_ng.zlib_ng"):
        found["png"]["zlib-ng, level 2"] = filtered(lambda rows: zlib_ng.compress(rows, 2))
    if fpng := optional("fpng"):
        found["png"]["fpng"] = fpng.from_ndarray
    if imagecodecs := optional("imagecodecs"):
        found["png"]["imagecodecs, level 1"] = lambda image: imagecodecs.png_encode(image, level=1)
        found["jpeg"]["imagecodecs"] = lambda image: imagecodecs.jpeg8_encode(image, level=95, subsampling="444")
        found["webp"]["imagecodecs"] = lambda image: imagecodecs.webp_encode(image, level=95, method=0, lossless=False)
    if cv2 := optional("cv2"):
        found["png"]["opencv, level 1"] = opencv(cv2, ".png", [cv2.IMWRITE_PNG_COMPRESSION, 1])
        found["jpeg"]["opencv, 4:2:0"] = opencv(cv2, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95])
    if pyvips := optional("pyvips"):
        found["png"]["libvips, level 1"] = libvips(pyvips, ".png", compression=1)
    return found


def optional(module: str) -> Any:
    """The module, or None."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ours(format: Any, quality: int) -> Encoder:
    return lambda image: encode_now(image, format, quality).content


def pillow(format: str, **options: Any) -> Encoder:
    def encode(image: Pixels) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format, **options)
        return file.getvalue()

    return encode


def opencv(cv2: Any, suffix: str, options: list[int]) -> Encoder:
    return lambda image: bytes(cv2.imencode(suffix, image[..., ::-1], options)[1].tobytes())


def libvips(pyvips: Any, suffix: str, **options: Any) -> Encoder:
    def encode(image: Pixels) -> bytes:
        height, width, bands = image.shape
        return bytes(
            pyvips.Image.new_from_memory(image.tobytes(), width, height, bands, "uchar").write_to_buffer(suffix, **options)
        )

    return encode


def filtered(compress: Callable[[Pixels], bytes]) -> Encoder:
    """Our PNG writer around another deflate."""
    from server.gateway import png

    def encode(image: Pixels) -> bytes:
        height, width, _ = image.shape
        header = b"".join(side.to_bytes(4, "big") for side in (width, height)) + bytes((8, 2, 0, 0, 0))
        body = compress(png.filtered(image))
        return b"".join((png.SIGNATURE, *chunk(b"IHDR", header), *chunk(b"IDAT", body), *chunk(b"IEND", b"")))

    return encode


def measure(name: str, image: Pixels, found: dict[str, dict[str, Encoder]], rounds: int) -> list[dict[str, Any]]:
    """One row per candidate: median milliseconds, bytes, and how many times as long as ours it takes."""
    spent: dict[tuple[str, str], list[float]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for _ in tqdm(range(rounds), desc=name, dynamic_ncols=True):
        for format, encoders in found.items():
            for encoder, encode in encoders.items():
                begin = time.perf_counter()
                content = encode(image)
                spent.setdefault((format, encoder), []).append((time.perf_counter() - begin) * 1000)
                sizes[format, encoder] = len(content)
    ratios = {key: np.median(np.array(values) / np.array(spent[key[0], OURS])) for key, values in spent.items()}
    return [
        {
            "picture": name,
            "format": format,
            "encoder": encoder,
            "ms": round(float(np.median(values)), 4),
            "ratio": round(float(ratios[format, encoder]), 2),
            "bytes": sizes[format, encoder],
        }
        for (format, encoder), values in spent.items()
    ]


def flatten(found: dict[str, dict[str, Encoder]]) -> dict[str, Encoder]:
    return {f"{format}: {name}": encode for format, encoders in found.items() for name, encode in encoders.items()}


async def held(encode: Encoder, image: Pixels) -> float:
    """The smallest of several rounds, since a busy machine has pauses of its own."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        return round(min([await longest_pause(encode, image) for _ in range(HELD_ROUNDS)]), 3)
    finally:
        sys.setswitchinterval(interval)


async def longest_pause(encode: Encoder, image: Pixels) -> float:
    """Share of an encoding on a thread for which the loop did not turn."""

    def timed() -> tuple[float, float]:
        begin = time.perf_counter()
        encode(image)
        return begin, time.perf_counter()

    encoding, turns = asyncio.ensure_future(asyncio.to_thread(timed)), []
    while not encoding.done():
        await asyncio.sleep(0)
        turns.append(time.perf_counter())
    begin, end = await encoding
    within = [begin, *(turn for turn in turns if begin < turn < end), end]
    return max(later - turn for turn, later in pairwise(within)) / (end - begin)


async def hop() -> float:
    """Median milliseconds to a thread and back."""
    loop, spent = asyncio.get_running_loop(), []
    with ThreadPoolExecutor(2) as threads:
        for _ in range(1000):
            begin = time.perf_counter()
            await loop.run_in_executor(threads, int)
            spent.append((time.perf_counter() - begin) * 1000)
    return float(np.median(spent))


def answer(content: bytes, rounds: int) -> dict[str, float]:
    """Median milliseconds of base64 and JSON around a file: by Python and by what the gateway uses."""
    ways: dict[str, Callable[[], bytes]] = {
        "python": lambda: json.dumps(
            {"b64_json": base64.b64encode(content).decode()}, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        ).encode(),
        OURS: lambda: to_json({"b64_json": to_base64(content)}),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(max(rounds, 20)):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            spent[name].append((time.perf_counter() - begin) * 1000)
    return {name: round(float(np.median(values)), 4) for name, values in spent.items()}


def report(document: dict[str, Any]) -> None:
    """For people; the JSON line that follows is for machines."""
    print(f"{document['rounds']} interleaved rounds, {document['device']}; a hop to a thread takes {document['hop_ms']} ms")
    print(f"{'picture':<14}{'format':<15}{'encoder':<30}{'ms':>9}{'x ours':>9}{'bytes':>10}{'held':>7}")
    for row in document["rows"]:
        share = document["held"][f"{row['format']}: {row['encoder']}"]
        said = f"{row['picture']:<14}{row['format']:<15}{row['encoder']:<30}"
        print(f"{said}{row['ms']:>9.3f}{row['ratio']:>9.2f}{row['bytes']:>10}{share:>7.2f}")
    for name, ways in document["json_ms"].items():
        print(f"base64 and JSON of a png, {name}: Python {ways['python']:.3f} ms, ours {ways[OURS]:.3f} ms")

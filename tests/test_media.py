"""Files hold the pixels they were made from, and making them leaves the event loop free."""

import asyncio
import io
import itertools
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from server.gateway.media import beside, encode, encode_now
from server.gateway.png import SIGNATURE, write_png
from server.gateway.schemas import Format
from server.metadata import CHUNK, Metadata, pixel_sha256, read_metadata

Pixels = npt.NDArray[np.uint8]


def decoded(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.mode == "RGB"
        return np.asarray(picture)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(side: int) -> Pixels:
    """A picture that jpeg is good at: two waves with a little noise."""
    y, x = np.mgrid[:side, :side] / side
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y), np.sin(5 * x * y)], -1)
    grain = np.random.default_rng(0).normal(size=(side, side, 3))
    return np.clip(128 + 90 * waves + 4 * grain, 0, 255).astype(np.uint8)


@st.composite
def images(draw: st.DrawFn) -> Pixels:
    """Any small picture: noise, one colour, a gradient, or a view that does not lie in memory row by row."""
    height, width, seed = draw(st.integers(1, 64)), draw(st.integers(1, 64)), draw(st.integers(0, 99))
    kind = draw(st.sampled_from(["noise", "constant", "gradient", "mirrored", "turned"]))
    if kind == "constant":
        return np.full((height, width, 3), draw(st.tuples(*[st.integers(0, 255)] * 3)), np.uint8)
    if kind == "gradient":
        return (np.arange(height * width * 3) // (1 + seed) % 256).astype(np.uint8).reshape(height, width, 3)
    picture = noise(height, width, seed)
    return {"noise": picture, "mirrored": picture[:, ::-1], "turned": picture.transpose(1, 0, 2)}[kind]


@given(images())
@settings(max_examples=150, deadline=None)
def test_png_and_lossless_webp_decode_to_exactly_the_given_pixels(image: Pixels) -> None:
    assert np.array_equal(decoded(encode_now(image, "png").content), image)
    assert np.array_equal(decoded(encode_now(image, "webp").content), image)
    assert np.array_equal(decoded(encode_now(image, "webp", 100).content), image)


@given(images(), st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_every_size_and_quality_makes_a_jpeg_and_a_webp_of_that_size(image: Pixels, quality: int) -> None:
    formats: tuple[Format, ...] = ("jpeg", "webp")
    for format in formats:
        assert decoded(encode_now(image, format, quality).content).shape == image.shape


def test_waiting_for_a_file_gives_the_same_file() -> None:
    image = noise(200, 200)
    assert asyncio.run(encode(image, "png", None)).content == encode_now(image, "png").content


def test_a_large_png_is_exact_too() -> None:
    for image in (noise(1024, 1000), smooth(1024), np.zeros((2048, 8, 3), np.uint8), np.full((8, 4096, 3), 255, np.uint8)):
        assert np.array_equal(decoded(encode_now(image, "png").content), image)


def test_the_chunks_of_a_png_are_in_order_and_their_checksums_are_those_of_zlib() -> None:
    content, names, at = write_png(noise(5, 7), {"a": "b", "ü": "日"}), [], len(SIGNATURE)
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + length]
        assert int.from_bytes(content[at + 8 + length : at + 12 + length], "big") == zlib.crc32(body)
        names.append(body[:4])
        at += 12 + length
    assert names == [b"IHDR", b"iTXt", b"iTXt", b"IDAT", b"IEND"]
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.text == {"a": "b", "ü": "日"}  # type: ignore[attr-defined]


def test_a_png_is_no_larger_than_pillow_s_fastest_by_more_than_a_tenth() -> None:
    for image in (smooth(128), smooth(512)):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png", compress_level=1)
        assert len(encode_now(image, "png").content) < 1.1 * len(file.getvalue())


@pytest.mark.parametrize("prompt", [None, 'a "red" circle\n\x00 אדום 🔴'])
def test_metadata_survives_in_a_png(tmp_path: Path, prompt: str | None) -> None:
    image = noise(9, 5)
    told = Metadata("tiny", prompt, 2**64 - 1, 3, 4, "5x9", "fp_0", {"rng": "1"}, pixel_sha256(image))
    file = tmp_path / "out.png"
    file.write_bytes(encode_now(image, "png", metadata=told).content)
    read, pixels = read_metadata(file)
    assert read == told
    assert np.array_equal(pixels, image)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_only_png_holds_metadata(format: Format) -> None:
    told = Metadata("tiny", "a secret prompt", 7, 0, 4, "5x9", "fp_0", {}, "")
    content = encode_now(noise(9, 5), format, 90, told).content
    assert CHUNK.encode() not in content
    assert b"secret" not in content


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_higher_quality_is_larger_and_nearer_to_the_pixels(format: Format) -> None:
    image = smooth(128)
    files = [encode_now(image, format, quality).content for quality in (0, 20, 40, 60, 80, 95, 100)]
    assert [len(file) for file in files] == sorted(len(file) for file in files)
    errors = [np.abs(decoded(file).astype(float) - image).mean() for file in files]
    assert errors == sorted(errors, reverse=True)
    assert encode_now(image, format).content == files[-1]


def test_a_jpeg_of_good_quality_keeps_the_edges_between_colours() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2], stripes[:, 1::2] = (255, 0, 0), (0, 0, 255)
    fine, coarse = (np.abs(decoded(encode_now(stripes, "jpeg", q).content).astype(int) - stripes).mean() for q in (90, 89))
    assert fine < coarse / 3


def test_tiny_pictures_are_made_on_the_spot_and_large_ones_on_threads() -> None:
    def thread(side: int, format: Format) -> threading.Thread:
        return asyncio.run(beside(np.zeros((side, side, 3), np.uint8), format, threading.current_thread))

    assert thread(128, "png") is threading.main_thread()
    assert thread(128, "jpeg") is threading.main_thread()
    assert thread(128, "webp") is not threading.main_thread()
    assert thread(129, "png") is not threading.main_thread()


@pytest.fixture
def unforced() -> Iterator[None]:
    """Threads keep the interpreter until they free it themselves."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize(("format", "compression"), [("png", None), ("jpeg", 100), ("webp", 80), ("webp", 100)])
def test_the_event_loop_turns_while_a_large_picture_is_encoded(unforced: None, format: Format, compression: int | None) -> None:
    image = noise(2048, 2048)
    # Of many rounds one must do: a busy machine has pauses of its own. An encoder that frees nothing is above 0.5 in all.
    assert any(asyncio.run(longest_pause(image, format, compression)) < 0.3 for _ in range(20))


async def longest_pause(image: Pixels, format: Format, compression: int | None) -> float:
    """For which share of the time that an encoding took the event loop did not turn."""
    turns: list[float] = []

    def timed() -> tuple[float, float]:
        begin = time.perf_counter()
        encode_now(image, format, compression)
        return begin, time.perf_counter()

    encoding = asyncio.ensure_future(beside(image, format, timed))
    while not encoding.done():
        await asyncio.sleep(0)
        turns.append(time.perf_counter())
    begin, end = await encoding
    within = [begin, *(turn for turn in turns if begin < turn < end), end]
    return max(later - turn for turn, later in itertools.pairwise(within)) / (end - begin)

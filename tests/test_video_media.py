"""Files of videos, decoded again: frame by frame, at the right time, near to the pixels they were made from."""

import io

import av
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from server.gateway.video_media import animate, durations, read_mp4, thumbnail, write_animation, write_mp4

Frames = npt.NDArray[np.uint8]
FORMATS = ("webp", "gif")


def moving(count: int = 16, height: int = 64, width: int = 64) -> Frames:
    """A soft red light that crosses a blue background: smooth, so that half of the chroma is enough."""
    y, x = np.mgrid[:height, :width]
    centres = np.linspace(0.2, 0.8, count) * width
    light = np.stack([np.exp(-((x - centre) ** 2 + (y - height / 2) ** 2) / (2 * (width / 6) ** 2)) for centre in centres])
    colours = light[..., None] * np.array([230, 60, 20]) + (1 - light[..., None]) * np.array([20, 60, 160])
    return np.round(colours).astype(np.uint8)


def psnr(one: Frames, other: Frames) -> float:
    return float(10 * np.log10(255**2 / np.maximum(((one.astype(float) - other) ** 2).mean(), 1e-9)))


def shown(content: bytes) -> tuple[Frames, list[int]]:
    """The frames of an animation, and for how many milliseconds each is shown."""
    with Image.open(io.BytesIO(content)) as picture:
        frames, times = [], []
        for frame in ImageSequence.Iterator(picture):
            frames.append(np.asarray(frame.convert("RGB")))
            times.append(int(frame.info["duration"]))
        return np.stack(frames), times


@pytest.mark.parametrize(("count", "fps"), [(16, 8), (1, 8), (49, 8), (17, 24), (33, 30)])
def test_an_mp4_has_exactly_the_frames_and_the_rate_that_were_asked_for(count: int, fps: int) -> None:
    frames = moving(count)
    content = write_mp4(frames, fps)
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (count, fps)
        assert stream.duration * stream.time_base * fps == count
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        times = [frame.time for frame in container.decode(stream)]
    assert times == pytest.approx([index / fps for index in range(count)], abs=1e-4)
    assert psnr(read_mp4(content)[0], frames) > 38


def test_the_index_of_an_mp4_comes_before_its_data() -> None:
    content = write_mp4(moving(), 8)
    assert 0 < content.index(b"moov") < content.index(b"mdat")


def test_the_same_frames_are_the_same_bytes_and_name_no_version() -> None:
    frames, contents = moving(height=48), set()
    for size in range(1_000, 41_000, 1_000):
        litter = [np.full(size + index, index, np.uint8) for index in range(40)]
        del litter  # an encoder that reads what it has not written finds this
        contents.add(write_mp4(frames, 8))
    assert len(contents) == 1
    assert b"Lavf" not in contents.pop()


def test_colours_are_said_and_kept() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 255, 255], [0, 0, 0]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (6, 32, 64, 3))
    content = write_mp4(frames, 8)
    assert np.abs(read_mp4(content)[0].astype(int) - frames).max() <= 6
    with av.open(io.BytesIO(content)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


@pytest.mark.parametrize(("height", "width"), [(63, 64), (64, 63)])
def test_an_odd_size_is_refused_by_name(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"even width and height, got {width}x{height}"):
        write_mp4(moving(2, height, width), 8)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("count", "fps"), [(16, 8), (49, 24), (2, 7)])
def test_an_animation_has_every_frame_and_lasts_as_long_as_the_video(format: str, count: int, fps: int) -> None:
    frames = moving(count)
    found, times = shown(write_animation(frames, fps, format))  # type: ignore[arg-type]
    assert len(found) == count
    assert sum(times) == pytest.approx(1000 * count / fps, abs=5 if format == "gif" else 1)
    assert max(times) - min(times) <= 10
    assert psnr(found, frames) > 30


def test_a_gif_of_equal_frames_still_lasts_as_long_and_a_webp_is_a_still_picture() -> None:
    frames = np.repeat(moving(1), 16, axis=0)
    assert sum(shown(write_animation(frames, 8, "gif"))[1]) == 2000
    found, _ = shown(write_animation(frames, 8, "webp"))
    assert len(found) == 1
    assert psnr(found, frames[:1]) > 35


@pytest.mark.parametrize("format", FORMATS)
def test_an_animation_repeats_forever_and_is_the_same_bytes_each_time(format: str) -> None:
    contents = {write_animation(moving(4), 8, format) for _ in range(2)}  # type: ignore[arg-type]
    (content,) = contents
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.info["loop"] == 0


def test_what_rests_does_not_flicker_in_a_gif() -> None:
    frames = moving()
    frames[:, :8] = (20, 60, 160)
    found, _ = shown(write_animation(frames, 8, "gif"))
    assert len(np.unique(found[:, :8].reshape(-1, 3), axis=0)) == 1


@given(count=st.integers(1, 100), fps=st.integers(1, 60), unit=st.sampled_from([1, 10]))
@settings(deadline=None)
def test_rounding_of_times_never_adds_up(count: int, fps: int, unit: int) -> None:
    times = durations(count, fps, unit)
    assert len(times) == count
    for index in range(count + 1):
        assert abs(sum(times[:index]) - 1000 * index / fps) <= unit / 2


@pytest.mark.parametrize("format", FORMATS)
def test_an_mp4_becomes_an_animation_of_its_own_length(format: str) -> None:
    frames = moving(24)
    found, times = shown(animate(write_mp4(frames, 24), format))  # type: ignore[arg-type]
    assert len(found) == 24
    assert sum(times) == 1000
    assert psnr(found, frames) > 30


def test_the_thumbnail_is_the_frame_in_the_middle() -> None:
    frames = moving()
    with Image.open(io.BytesIO(thumbnail(frames))) as picture:
        assert picture.format == "WEBP"
        likeness = [psnr(np.asarray(picture.convert("RGB")), frame) for frame in frames]
    assert likeness.index(max(likeness)) == 8
    assert max(likeness) > 35

"""Frames -> files of a video: mp4 for players, animated WebP and GIF for pages and chats, one frame as a thumbnail."""

import io
import tempfile
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, get_args

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from server.gateway.media import write_webp

VideoFormat = Literal["mp4", "webp", "gif"]
VIDEO_FORMATS: tuple[VideoFormat, ...] = get_args(VideoFormat)
MEDIA_TYPES: dict[VideoFormat, str] = {"mp4": "video/mp4", "webp": "image/webp", "gif": "image/gif"}

Frames = npt.NDArray[np.uint8]

# Finer than what is called visually lossless (18), since WebP and GIF are made from the mp4. One thread, since x264 cuts the
# frames up by its threads: the same frames are the same bytes on any number of cores. No mbtree, since it reads memory that
# nobody has written: one file in ten was another. bitexact: no version in the file.
H264 = {"crf": "14", "preset": "medium", "threads": "1", "x264-params": "no-mbtree=1", "flags": "+bitexact"}
MP4 = {"movflags": "+faststart", "fflags": "+bitexact"}
QUALITY = 90  # of the WebP animation and of the thumbnail
PALETTE_PIXELS = 2**18  # from which the colours of a GIF are chosen


def write_mp4(frames: Frames, fps: int) -> bytes:
    """frames uint8 [F, H, W, 3] -> H.264 (yuv420p, BT.709) with exactly F frames at exactly `fps`, the index before the data.

    The same bytes whenever it is called on one machine. Raises ValueError for an odd height or width, which 4:2:0 has no pixels
    for.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"an mp4 needs an even width and height, got {width}x{height}")
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:  # faststart reads what it has written, through a second descriptor
        with av.open(file.name, "w", format="mp4", options=MP4) as container:
            stream: Any = container.add_stream("libx264", rate=fps, options=H264)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            say_colours(stream.codec_context)
            for index, frame in enumerate(frames):
                container.mux(stream.encode(yuv(frame, index, fps)))
            container.mux(stream.encode(None))
        return file.read()


def say_colours(codec: Any) -> None:
    """Players guess by the size of a video whose colours are not said."""
    codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
    codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def yuv(frame: Frames, index: int, fps: int) -> av.VideoFrame:
    """uint8 [H, W, 3] -> the frame that is shown from `index` / `fps` seconds on."""
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
    picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
    picture.pts, picture.time_base = index, Fraction(1, fps)
    return picture


def read_mp4(content: bytes) -> tuple[Frames, int]:
    """What a player shows of an mp4 of ours, uint8 [F, H, W, 3], and its frames per second."""
    with av.open(io.BytesIO(content), "r") as container:
        rate = container.streams.video[0].average_rate
        frames: list[Frames] = [frame.to_ndarray(format="rgb24").astype(np.uint8) for frame in container.decode(video=0)]
    assert rate is not None
    return np.stack(frames), round(rate)


def animate(mp4: bytes, format: Literal["webp", "gif"]) -> bytes:
    """An mp4 of ours as an animation: where colours meet it is less sharp than the frames were, as the mp4 is."""
    return write_animation(*read_mp4(mp4), format)


def write_animation(frames: Frames, fps: int, format: Literal["webp", "gif"]) -> bytes:
    """frames uint8 [F, H, W, 3] -> an animation that repeats forever.

    WebP keeps time to the millisecond, GIF to a hundredth of a second; rounding never adds up. Equal frames in a row become one
    that is shown for as long, and a WebP of nothing but equal frames a still picture.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    file, more = io.BytesIO(), {"quality": QUALITY, "method": 0} if format == "webp" else {"disposal": 1}
    if format == "gif":
        colours = palette(frames)
        pictures = [picture.quantize(palette=colours, dither=Image.Dither.NONE) for picture in pictures]
    lengths = durations(len(frames), fps, 1 if format == "webp" else 10)
    pictures[0].save(file, format, save_all=True, append_images=pictures[1:], duration=lengths, loop=0, **more)
    return file.getvalue()


def palette(frames: Frames) -> Image.Image:
    """256 colours for all frames alike, so that what rests does not flicker; chosen from evenly spread pixels."""
    pixels = frames.reshape(-1, 3)[:: -(-frames[..., 0].size // PALETTE_PIXELS)]
    return Image.fromarray(np.ascontiguousarray(pixels[None])).quantize(256)


def durations(count: int, fps: int, unit: int) -> list[int]:
    """Milliseconds of each frame, in multiples of `unit`; the first n last n / fps seconds, rounded once."""
    ends = [round(index * 1000 / (fps * unit)) * unit for index in range(count + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def thumbnail(frames: Frames) -> bytes:
    """The frame in the middle, where what moves has moved, as WebP."""
    return write_webp(frames[len(frames) // 2], QUALITY)


def write_video(frames: Frames, fps: int, format: VideoFormat) -> bytes:
    """frames uint8 [F, H, W, 3] -> a file."""
    return write_mp4(frames, fps) if format == "mp4" else write_animation(frames, fps, format)

"""A video on its way from latents to pixels, chunk by chunk, so that memory is bounded and the device is never held for long.

The decoder of CogVideoX is causal: what a chunk needs of those before it are the last frames that each convolution has seen.
The first chunk's graph puts them out as one row of numbers, the state, which the graph of every later chunk takes in and puts
out anew. Chunks overlap nowhere, and since diffusers decodes in the same chunks, normalising over each, the pixels are those
of a decode in one piece.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from server.engine.device_runtime import DeviceTensor
from server.engine.errors import NumericalError


class Clip:
    """A video that is being decoded. state: float32 [1, N] between two chunks, perhaps on the device; begin: of the first one,
    on the clock of time.perf_counter_ns; nanoseconds: of all so far."""

    def __init__(self, latents: npt.NDArray[np.float32], chunks: list[int], shape: tuple[int, ...]) -> None:
        """latents: [1, F, C, h, w]; chunks: latent frames of each; shape: [frames, H, W, 3] of the pixels."""
        assert latents.shape[1] == sum(chunks)
        self.latents, self.chunks, self.shape = latents, chunks, shape
        self.parts: list[npt.NDArray[np.uint8]] = []
        self.state: npt.NDArray[Any] | DeviceTensor | None = None
        self.begin = self.nanoseconds = 0

    @property
    def left(self) -> int:
        """Chunks still to decode."""
        return len(self.chunks) - len(self.parts)

    @property
    def coming(self) -> npt.NDArray[np.float32]:
        """The latents of the coming chunk, [1, f, C, h, w]."""
        begin, frames = sum(self.chunks[: len(self.parts)]), self.chunks[len(self.parts)]
        return np.ascontiguousarray(self.latents[:, begin : begin + frames])

    @property
    def video(self) -> npt.NDArray[np.uint8]:
        """The frames so far, uint8 [f, H, W, 3]."""
        return self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)

    def add(self, frames: npt.NDArray[np.uint8], state: npt.NDArray[Any] | DeviceTensor | None) -> None:
        """What a chunk was decoded to, uint8 [1, f, H, W, 3], and the state after it. Raises NumericalError for frames of
        another shape, and for more or fewer than the video has."""
        count = sum(map(len, self.parts)) + frames.shape[1]
        enough = count == self.shape[0] if self.left == 1 else count < self.shape[0]
        if frames.dtype != np.uint8 or frames.shape[2:] != self.shape[1:] or not enough:
            had, of = count - frames.shape[1], f"a chunk of a video of uint8 {self.shape}"
            raise NumericalError(f"the decoder gave {frames.dtype} {frames.shape} after {had} frames, expected {of}")
        self.parts.append(frames[0])
        self.state = state

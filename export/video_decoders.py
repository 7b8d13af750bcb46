"""Latents of a video -> pixels: as diffusers decodes them, and chunk by chunk as two graphs.

AutoencoderKLCogVideoX decodes two latent frames at a time, the first time three where their number is odd, and normalises over
each of these chunks. Its convolutions look back in time alone: the last two frames that each has seen are all that a chunk
needs of those before it, through however many layers. So chunks that are cut where diffusers cuts, and hand on those frames,
give its pixels exactly; chunks that overlap would have to be cut elsewhere, and could not.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from torch import nn

from export.decoders import to_bytes
from tdm_train.backbones.sizes import pixel_block

Caches = dict[str, Any]  # nested as the decoder's modules; the leaves are frames [B, C, T, h, w]
WITHOUT_PAST = ("conv_y", "conv_b")  # convolutions over one frame, which have an entry among the caches all the same


class VideoDecoder(nn.Module):
    """latents float32 [B, F, C, h, w] -> video uint8 [B, frames, H, W, 3], by diffusers itself."""

    def __init__(self, vae: AutoencoderKLCogVideoX):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return to_video(self.vae.decode(unscale(self.vae, latents), return_dict=False)[0], self.vae)


class ChunkDecoder(nn.Module):
    """The first chunk of a video, or a later one.

    latents float32 [1, f, C, h, w], of a later chunk also state float32 [1, N] -> video uint8 [1, frames, H, W, 3] and, where a
    chunk follows, next_state float32 [1, N]. The state is all caches in one row.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, first: "ChunkDecoder | None" = None, followed: bool = True):
        """first: for a later chunk, the decoder of the first one, which has run."""
        super().__init__()
        self.vae, self.followed = vae, followed
        self.decoder, self.post_quant = in_frames(vae.decoder), in_frames(nn.ModuleList([vae.post_quant_conv or nn.Identity()]))
        self.before = first and first.after
        self.after: list[tuple[tuple[str, ...], torch.Size]] = []

    def forward(self, latents: torch.Tensor, state: torch.Tensor | None = None) -> Any:
        scaled = self.post_quant[0](unscale(self.vae, latents))
        decoded, caches = self.decoder(scaled, conv_cache=None if state is None else self.caches(state))
        video = to_video(decoded, self.vae)
        if not self.followed:
            return video
        leaves = list(walk(caches))
        self.after = [(path, leaf.shape) for path, leaf in leaves]
        return video, torch.cat([leaf.flatten(1) for _, leaf in leaves], dim=1).float()

    def caches(self, state: torch.Tensor) -> Caches:
        """The state -> the caches, as the decoder wants them."""
        assert self.before
        caches: Caches = {}
        rows = torch.split(state.to(self.vae.dtype), [shape[1:].numel() for _, shape in self.before], dim=1)
        for (path, shape), row in zip(self.before, rows, strict=True):
            below = caches
            for name in path[:-1]:
                below = below.setdefault(name, {})
            below[path[-1]] = row.reshape(shape)
        return caches


class FrameConv(nn.Module):
    """A 3-D convolution [B, C, T, H, W] as a 2-D one of every frame, stacked as channels on the frames before it.

    onnxruntime makes a matrix product of a 3-D convolution and cuts it up among threads, and what is left for each may be so
    small that it is summed in another order: the pixels would depend on the number of threads. Its 2-D convolutions have no
    such cut, and take 0.6 to 0.95 of the time on one thread.
    """

    def __init__(self, conv: nn.Conv3d):
        super().__init__()
        assert (conv.stride, conv.dilation, conv.groups, conv.padding[0]) == ((1, 1, 1), (1, 1, 1), 1, 0)
        self.frames, self.padding, self.bias = conv.kernel_size[0], conv.padding[1:], conv.bias
        self.weight = nn.Parameter(conv.weight.detach().transpose(1, 2).flatten(1, 2), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        count = inputs.shape[2] - self.frames + 1
        stacked = torch.cat([inputs[:, :, first : first + count] for first in range(self.frames)], dim=1).transpose(1, 2)
        outputs = F.conv2d(stacked.flatten(0, 1), self.weight, self.bias, padding=self.padding)
        return outputs.reshape(inputs.shape[0], count, *outputs.shape[1:]).transpose(1, 2)


def in_frames(module: Any) -> Any:
    """A copy with a FrameConv in the place of every 3-D convolution."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv3d):
                setattr(parent, name, FrameConv(child))
    return module


def chunks_of(vae: AutoencoderKLCogVideoX, frames: int) -> list[int]:
    """How AutoencoderKLCogVideoX cuts up so many latent frames: the first chunk has what is left over."""
    size = vae.num_latent_frames_batch_size
    count = max(frames // size, 1)
    return [frames - size * (count - 1), *[size] * (count - 1)]


def walk(caches: Caches, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """(path, frames) of every cache that a later chunk needs."""
    for name, below in caches.items():
        if isinstance(below, dict):
            yield from walk(below, (*path, name))
        elif name not in WITHOUT_PAST:
            yield (*path, name), below


def unscale(vae: AutoencoderKLCogVideoX, latents: torch.Tensor) -> torch.Tensor:
    """Latents of unit scale [B, F, C, h, w] -> the decoder's own [B, C, F, h, w], as the pipeline does before it decodes."""
    scale: float = vae.config.scaling_factor
    return (latents.transpose(1, 2) / scale).to(vae.dtype)


def to_video(decoded: torch.Tensor, vae: AutoencoderKLCogVideoX) -> torch.Tensor:
    """Decoded values [B, 3, frames, H, W], or pixel blocks as of ImageDecoder, -> uint8 [B, frames, H, W, 3]."""
    frames, block = decoded.float().transpose(1, 2), pixel_block(vae.config)
    if block > 1:
        frames = F.pixel_shuffle(frames, block)
    return to_bytes(frames).permute(0, 1, 3, 4, 2)

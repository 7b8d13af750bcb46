"""Latents -> pixels as one graph: scaling, decoding, clamping and rounding to uint8."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from tdm_train.backbones.sizes import pixel_block


class ImageDecoder(nn.Module):
    """latents float32 [B, C, h, w] -> image uint8 [B, H, W, 3].

    mean, std: of the latents the decoder was trained on, [C, 1, 1], None for most.

    A decoder with 3 * p * p output channels puts out p x p pixel blocks (see tdm_train/scenes/autoencoder.py).
    """

    mean: torch.Tensor | None
    std: torch.Tensor | None

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny):
        super().__init__()
        self.vae, self.block = vae, pixel_block(vae.config)
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if (mean is None) != (std is None):
            raise ValueError(f"the decoder has latents_mean={mean} and latents_std={std}, legal: both or neither")
        self.register_buffer("mean", per_channel(mean), persistent=False)
        self.register_buffer("std", per_channel(std), persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.vae.decode(self.unscale(latents).to(self.vae.dtype), return_dict=False)[0].float()
        if self.block > 1:
            decoded = F.pixel_shuffle(decoded, self.block)
        return to_bytes(decoded).permute(0, 2, 3, 1)

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of unit scale -> the decoder's own, as each family's pipeline does before it decodes."""
        scale: float = self.vae.config.scaling_factor
        shift: float | None = self.vae.config.get("shift_factor")
        if self.mean is not None and self.std is not None:
            latents = latents * self.std
            return latents / scale + self.mean
        return latents / scale if shift is None else latents / scale + shift


def per_channel(values: list[float] | None) -> torch.Tensor | None:
    """[C] -> [C, 1, 1] float32."""
    return None if values is None else torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)


def to_bytes(decoded: torch.Tensor) -> torch.Tensor:
    """Values of -1 .. 1 -> 0 .. 255."""
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

"""The three graphs of an exported student as modules with named tensors."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from transformers import T5EncoderModel

from tdm_train.denoiser import Denoiser, Text


class TextEncoder(nn.Module):
    """(tokens int64 [B, L], mask int64 [B, L]) -> text_emb float32 [B, L, D]."""

    def __init__(self, encoder: T5EncoderModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        torch._check(tokens.shape[0] == mask.shape[0])  # type: ignore[no-untyped-call]
        text_emb: torch.Tensor = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return text_emb


class StudentStep(nn.Module):
    """One NFE with the solver's update fused in: next = c0 * latents + c1 * x0 + c2 * x0_prev.

    latents, x0_prev: float32 [B, C, h, w]; timestep: float32 [B]; coefficients: float32 [B, 3]; nfe: int64 [B];
    text_emb: float32 [B, L, D]; mask: int64 [B, L] -> (next_latents, x0), both float32 [B, C, h, w]. Every row has its own
    timestep, coefficients and nfe, so requests at different steps share a batch.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        # PixArt squeezes dimension 1 after proj_out, which acts on nothing in PyTorch but becomes an ONNX Squeeze that
        # onnxruntime refuses; a dimension of one put in front of it makes both the same.
        denoiser.network.proj_out.register_forward_hook(lambda module, inputs, output: output[:, None])

    def forward(
        self,
        latents: torch.Tensor,
        x0_prev: torch.Tensor,
        timestep: torch.Tensor,
        coefficients: torch.Tensor,
        nfe: torch.Tensor,
        text_emb: torch.Tensor,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The exporter gives each input its own batch symbol; it must be told that they are one.
        for other in (x0_prev, timestep, coefficients, nfe, text_emb, mask):
            torch._check(other.shape[0] == latents.shape[0])  # type: ignore[no-untyped-call]
        x0, _ = self.denoiser(latents, timestep, Text(text_emb, mask), nfe)
        c0, c1, c2 = (coefficients[:, column, None, None, None] for column in range(3))
        return c0 * latents + c1 * x0 + c2 * x0_prev, x0


class VaeDecoder(nn.Module):
    """latents float32 [B, C, h, w] -> image uint8 [B, H, W, 3]: scaling, decoding, clamping and rounding.

    A decoder with 3 * p * p output channels puts out p x p pixel blocks (see tdm_train/scenes/autoencoder.py).
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae
        self.block = round((vae.config.out_channels / 3) ** 0.5)
        if 3 * self.block**2 != vae.config.out_channels:
            raise ValueError(f"a decoder with {vae.config.out_channels} output channels is neither RGB nor RGB pixel blocks")

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0].float()
        if self.block > 1:
            decoded = F.pixel_shuffle(decoded, self.block)
        return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def pixel_size(vae: AutoencoderKL, latent_size: int) -> int:
    """Pixels along one side of the picture that latents of `latent_size` decode to."""
    block = round((vae.config.out_channels / 3) ** 0.5)
    return int(latent_size * 2 ** (len(vae.config.block_out_channels) - 1) * block)

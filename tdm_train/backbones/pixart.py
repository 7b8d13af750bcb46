"""PixArt-alpha and PixArt-Sigma (arXiv 2310.00426, 2403.04692): cross-attention to T5 embeddings under a mask."""

from typing import Any

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from tdm_train.backbones.sizes import latent_size, pixel_scale, refuse_frames
from tdm_train.backbones.tokens import refuse_long_prompts
from tdm_train.denoiser import Denoiser, Text
from tdm_train.samplers import schedule_of, tells_whole_timesteps
from tdm_train.schedule import NoiseSchedule

FAMILY = "pixart"
PIPELINES = (PixArtAlphaPipeline, PixArtSigmaPipeline)
NETWORK = "transformer"


class PixArtDenoiser(Denoiser):
    """PixArtTransformer2DModel; x_t [B, C, h, w]. `pixel_scale`: pixels per latent, for networks that are told the size."""

    def __init__(
        self,
        network: PixArtTransformer2DModel,
        schedule: NoiseSchedule,
        whole_timesteps: bool = True,
        pixel_scale: int = 8,
    ):
        super().__init__(network, schedule, whole_timesteps)
        self.pixel_scale = pixel_scale

    def run_network(self, x_t: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        prediction: torch.Tensor = self.network(
            x_t,
            encoder_hidden_states=text.emb,
            encoder_attention_mask=text.mask,
            timestep=t,
            added_cond_kwargs=self.size_conditions(x_t),
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]]  # PixArt may predict a variance too; no sampler here uses it

    def size_conditions(self, x_t: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """(height, width) in pixels and height / width, float32 [B, 2] and [B, 1], for the networks that take them."""
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        ones = x_t.new_ones(x_t.shape[0], 1, dtype=torch.float32)
        height, width = ones * (x_t.shape[2] * self.pixel_scale), ones * (x_t.shape[3] * self.pixel_scale)
        return {"resolution": torch.cat([height, width], dim=1), "aspect_ratio": height / width}


def denoiser_of(pipeline: Any) -> PixArtDenoiser:
    schedule, whole = schedule_of(pipeline.scheduler), tells_whole_timesteps(pipeline.scheduler)
    return PixArtDenoiser(pipeline.transformer, schedule, whole, pixel_scale(pipeline))


@torch.no_grad()
def encode(pipeline: Any, prompts: list[str], text_length: int) -> Text:
    """Prompts as the pipeline encodes them: emb [N, text_length, D] and mask."""
    refuse_long_prompts(prompts, pipeline.tokenizer, text_length)
    emb, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=text_length)
    return Text(emb, mask)


def blank_text(pipeline: Any, count: int, text_length: int) -> Text:
    """A Text of zeros on the meta device, as `encode` makes of `count` prompts: for what only shapes decide."""
    emb = torch.zeros(count, text_length, pipeline.transformer.config.caption_channels, device="meta")
    return Text(emb, torch.zeros(count, text_length, dtype=torch.int64, device="meta"))


def latent_shape(pipeline: Any, width: int, height: int, frames: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a picture of width x height pixels."""
    refuse_frames(frames)
    config = pipeline.transformer.config
    return config.in_channels, *latent_size(pipeline, width, height, config.patch_size)

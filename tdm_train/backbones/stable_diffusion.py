"""Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a UNet with cross-attention to CLIP embeddings."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from tdm_train.backbones.sizes import latent_size, refuse_frames
from tdm_train.backbones.tokens import refuse_long_prompts, refuse_text_length
from tdm_train.denoiser import Denoiser, Text
from tdm_train.samplers import schedule_of, tells_whole_timesteps

FAMILY = "stable_diffusion"
PIPELINES = (StableDiffusionPipeline,)
NETWORK = "unet"


class StableDiffusionDenoiser(Denoiser):
    """UNet2DConditionModel with text alone; x_t [B, C, h, w]."""

    def run_network(self, x_t: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        prediction: torch.Tensor = self.network(x_t, t, encoder_hidden_states=text.emb, return_dict=False)[0]
        return prediction


def denoiser_of(pipeline: Any) -> StableDiffusionDenoiser:
    refuse_guidance_embedding(pipeline.unet)
    schedule, whole = schedule_of(pipeline.scheduler), tells_whole_timesteps(pipeline.scheduler)
    return StableDiffusionDenoiser(pipeline.unet, schedule, whole)


def refuse_guidance_embedding(unet: Any) -> None:
    """Raises ValueError for a UNet that takes the guidance scale as an input, as students of latent consistency do."""
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(f"the UNet has time_cond_proj_dim={unet.config.time_cond_proj_dim}, legal: None (no guidance input)")


@torch.no_grad()
def encode(pipeline: Any, prompts: list[str], text_length: int) -> Text:
    """Prompts as the pipeline encodes them: emb [N, text_length, D]. text_length must be the tokenizer's own, 77."""
    refuse_text_length(text_length, pipeline.tokenizer.model_max_length)
    refuse_long_prompts(prompts, pipeline.tokenizer, text_length)
    emb, _ = pipeline.encode_prompt(prompts, pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return Text(emb)


def blank_text(pipeline: Any, count: int, text_length: int) -> Text:
    """A Text of zeros on the meta device, as `encode` makes of `count` prompts: for what only shapes decide."""
    return Text(torch.zeros(count, text_length, pipeline.unet.config.cross_attention_dim, device="meta"))


def latent_shape(pipeline: Any, width: int, height: int, frames: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a picture of width x height pixels."""
    refuse_frames(frames)
    return pipeline.unet.config.in_channels, *latent_size(pipeline, width, height, patch=1)

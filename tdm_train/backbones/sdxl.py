"""Stable Diffusion XL (arXiv 2307.01952): a UNet under two CLIP text encoders that is told the size of the picture."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from tdm_train.backbones.sizes import latent_size, pixel_scale, refuse_frames
from tdm_train.backbones.stable_diffusion import refuse_guidance_embedding
from tdm_train.backbones.tokens import refuse_long_prompts, refuse_text_length
from tdm_train.denoiser import Denoiser, Text
from tdm_train.samplers import schedule_of, tells_whole_timesteps
from tdm_train.schedule import NoiseSchedule

FAMILY = "sdxl"
PIPELINES = (StableDiffusionXLPipeline,)
NETWORK = "unet"


class SDXLDenoiser(Denoiser):
    """UNet2DConditionModel with text, pooled text and sizes; x_t [B, C, h, w]. `pixel_scale`: pixels per latent."""

    def __init__(
        self,
        network: UNet2DConditionModel,
        schedule: NoiseSchedule,
        whole_timesteps: bool = True,
        pixel_scale: int = 8,
    ):
        super().__init__(network, schedule, whole_timesteps)
        self.pixel_scale = pixel_scale

    def run_network(self, x_t: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        assert text.pooled is not None
        # Both in float32: the UNet joins them before it casts, and exporters do not promote mixed types.
        conditions = {"text_embeds": text.pooled.float(), "time_ids": self.time_ids(x_t)}
        prediction: torch.Tensor = self.network(
            x_t, t, encoder_hidden_states=text.emb, added_cond_kwargs=conditions, return_dict=False
        )[0]
        return prediction

    def time_ids(self, x_t: torch.Tensor) -> torch.Tensor:
        """Original size, crop and target size, (H, W, 0, 0, H, W) in pixels: float32 [B, 6], as for an uncropped picture."""
        ones = x_t.new_ones(x_t.shape[0], dtype=torch.float32)
        height, width = ones * (x_t.shape[2] * self.pixel_scale), ones * (x_t.shape[3] * self.pixel_scale)
        return torch.stack([height, width, 0 * ones, 0 * ones, height, width], dim=1)


def denoiser_of(pipeline: Any) -> SDXLDenoiser:
    refuse_guidance_embedding(pipeline.unet)
    schedule, whole = schedule_of(pipeline.scheduler), tells_whole_timesteps(pipeline.scheduler)
    return SDXLDenoiser(pipeline.unet, schedule, whole, pixel_scale(pipeline))


@torch.no_grad()
def encode(pipeline: Any, prompts: list[str], text_length: int) -> Text:
    """Prompts as the pipeline encodes them: emb [N, text_length, D1 + D2], the last but one hidden states of both encoders, and
    pooled [N, P] of the second. text_length must be the tokenizers' own, 77."""
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        refuse_text_length(text_length, tokenizer.model_max_length)
        refuse_long_prompts(prompts, tokenizer, text_length)
    emb, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return Text(emb, pooled=pooled)


def blank_text(pipeline: Any, count: int, text_length: int) -> Text:
    """A Text of zeros on the meta device, as `encode` makes of `count` prompts: for what only shapes decide."""
    config = pipeline.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    emb = torch.zeros(count, text_length, config.cross_attention_dim, device="meta")
    return Text(emb, pooled=torch.zeros(count, pooled, device="meta"))


def latent_shape(pipeline: Any, width: int, height: int, frames: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a picture of width x height pixels."""
    refuse_frames(frames)
    return pipeline.unet.config.in_channels, *latent_size(pipeline, width, height, patch=1)

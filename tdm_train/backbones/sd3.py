"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer over latents and text together, under three text encoders."""

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from tdm_train.backbones.sizes import latent_size, refuse_frames
from tdm_train.backbones.tokens import refuse_long_prompts
from tdm_train.denoiser import Denoiser, Text
from tdm_train.samplers import schedule_of, tells_whole_timesteps

FAMILY = "sd3"
PIPELINES = (StableDiffusion3Pipeline,)
NETWORK = "transformer"


class SD3Denoiser(Denoiser):
    """SD3Transformer2DModel; x_t [B, C, h, w]."""

    def run_network(self, x_t: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        assert text.pooled is not None
        prediction: torch.Tensor = self.network(
            x_t,
            encoder_hidden_states=text.emb,
            pooled_projections=text.pooled.to(x_t.dtype),
            timestep=t,
            return_dict=False,
        )[0]
        return prediction


def denoiser_of(pipeline: Any) -> SD3Denoiser:
    return SD3Denoiser(pipeline.transformer, schedule_of(pipeline.scheduler), tells_whole_timesteps(pipeline.scheduler))


@torch.no_grad()
def encode(pipeline: Any, prompts: list[str], text_length: int) -> Text:
    """Prompts as the pipeline encodes them: emb [N, 77 + text_length, D], both CLIP encoders' side by side and T5's behind
    them, and pooled [N, P] of both CLIP encoders. text_length is T5's share; without T5 it is zeros."""
    clip_length = pipeline.tokenizer_max_length
    tokenizers = [(pipeline.tokenizer, clip_length), (pipeline.tokenizer_2, clip_length), (pipeline.tokenizer_3, text_length)]
    for tokenizer, length in tokenizers:
        if tokenizer is not None:
            refuse_long_prompts(prompts, tokenizer, length)
    emb, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=text_length
    )
    return Text(emb, pooled=pooled)


def blank_text(pipeline: Any, count: int, text_length: int) -> Text:
    """A Text of zeros on the meta device, as `encode` makes of `count` prompts: for what only shapes decide."""
    config = pipeline.transformer.config
    emb = torch.zeros(count, pipeline.tokenizer_max_length + text_length, config.joint_attention_dim, device="meta")
    return Text(emb, pooled=torch.zeros(count, config.pooled_projection_dim, device="meta"))


def latent_shape(pipeline: Any, width: int, height: int, frames: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a picture of width x height pixels."""
    refuse_frames(frames)
    config = pipeline.transformer.config
    return config.in_channels, *latent_size(pipeline, width, height, config.patch_size)

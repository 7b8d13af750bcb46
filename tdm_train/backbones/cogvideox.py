"""CogVideoX (arXiv 2408.06072) of the first generation: a transformer over video latents and T5 embeddings together.

2B adds sines of the positions to its latents, 5B turns its attention by them (rotary embeddings).
"""

from typing import Any

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

from tdm_train.backbones.sizes import latent_size
from tdm_train.backbones.tokens import refuse_long_prompts, refuse_text_length
from tdm_train.denoiser import Denoiser, Text
from tdm_train.samplers import schedule_of, tells_whole_timesteps
from tdm_train.schedule import NoiseSchedule

FAMILY = "cogvideox"
PIPELINES = (CogVideoXPipeline,)
NETWORK = "transformer"


class CogVideoXDenoiser(Denoiser):
    """CogVideoXTransformer3DModel; x_t [B, F, C, h, w].

    Rotary embeddings of the network's own video size are kept (float32, in no file); other sizes' are made when met.
    """

    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None

    def __init__(self, network: CogVideoXTransformer3DModel, schedule: NoiseSchedule, whole_timesteps: bool = True):
        super().__init__(network, schedule, whole_timesteps)
        config = network.config
        if config.patch_size_t is not None:
            raise ValueError(f"the network has patch_size_t={config.patch_size_t} (CogVideoX 1.5), legal: None (CogVideoX 1.0)")
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        self.own_size = (frames, config.sample_height, config.sample_width)
        cos, sin = rotary_embedding(config, *self.own_size) if config.use_rotary_positional_embeddings else (None, None)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    def run_network(self, x_t: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        prediction: torch.Tensor = self.network(
            x_t, encoder_hidden_states=text.emb, timestep=t, image_rotary_emb=self.rotary(x_t), return_dict=False
        )[0]
        return prediction

    def rotary(self, x_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin for the positions of x_t, float32 [F * h/p * w/p, head width]; None for 2B."""
        if self.rotary_cos is None or self.rotary_sin is None:
            return None
        size = (x_t.shape[1], x_t.shape[3], x_t.shape[4])
        if size == self.own_size:
            return self.rotary_cos, self.rotary_sin
        return rotary_embedding(self.network.config, *size, device=x_t.device)


def rotary_embedding(
    config: Any, frames: int, height: int, width: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of CogVideoX 1.0 for latents of a size, which are placed on the grid of the network's own size."""
    patch = config.patch_size
    placed = (height // patch, width // patch)
    crop = get_resize_crop_region_for_grid(placed, config.sample_width // patch, config.sample_height // patch)
    cos, sin = get_3d_rotary_pos_embed(config.attention_head_dim, crop, placed, frames, device=device)
    return cos, sin


def denoiser_of(pipeline: Any) -> CogVideoXDenoiser:
    return CogVideoXDenoiser(pipeline.transformer, schedule_of(pipeline.scheduler), tells_whole_timesteps(pipeline.scheduler))


@torch.no_grad()
def encode(pipeline: Any, prompts: list[str], text_length: int) -> Text:
    """Prompts as the pipeline encodes them: emb [N, text_length, D], without a mask. text_length must be the network's own."""
    refuse_text_length(text_length, pipeline.transformer.config.max_text_seq_length)
    refuse_long_prompts(prompts, pipeline.tokenizer, text_length)
    emb, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=text_length)
    return Text(emb)


def blank_text(pipeline: Any, count: int, text_length: int) -> Text:
    """A Text of zeros on the meta device, as `encode` makes of `count` prompts: for what only shapes decide."""
    return Text(torch.zeros(count, text_length, pipeline.transformer.config.text_embed_dim, device="meta"))


def latent_shape(pipeline: Any, width: int, height: int, frames: int | None = None) -> tuple[int, int, int, int]:
    """(F, C, h, w) of the latents of a video of `frames` frames of width x height pixels."""
    if frames is None or frames < 1:
        raise ValueError(f"frames={frames}: a video needs a number of frames, for example 49")
    config = pipeline.transformer.config
    h, w = latent_size(pipeline, width, height, config.patch_size)
    return (frames - 1) // pipeline.vae_scale_factor_temporal + 1, config.in_channels, h, w

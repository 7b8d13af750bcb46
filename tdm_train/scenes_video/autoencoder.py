"""The autoencoder of clips: diffusers' AutoencoderKLCogVideoX over 4x4 pixel blocks, 16 frames of 64 x 64 pixels to 4 latent
frames of 4 x 4 x 16.

It begins as the scenes autoencoder of every frame (see inflate.py), which is worth an hour of training on two cores.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX
from torch import nn

from tdm_train.recipes import MotionAutoencoderRecipe
from tdm_train.run import Run
from tdm_train.scenes.world import COLOURS
from tdm_train.scenes_video.inflate import inflate
from tdm_train.scenes_video.world import FRAME_SIZE, draw_clip, render_clip, render_clips

BLOCK = 4
LATENT_CHANNELS = 16


def new_autoencoder() -> AutoencoderKLCogVideoX:
    """An untrained autoencoder: 48 channels (4 x 4 x RGB) of 16 x 16 x 16 to 16 channels of 4 x 4 x 4 and back."""
    widths = (32, 64, 128)
    return AutoencoderKLCogVideoX(
        in_channels=3 * BLOCK**2,
        out_channels=3 * BLOCK**2,
        down_block_types=("CogVideoXDownBlock3D",) * len(widths),
        up_block_types=("CogVideoXUpBlock3D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        temporal_compression_ratio=4,
        sample_height=FRAME_SIZE // BLOCK,
        sample_width=FRAME_SIZE // BLOCK,
    )


def to_blocks(clips: torch.Tensor) -> torch.Tensor:
    """uint8 clips [B, F, H, W, 3] to float blocks [B, 48, F, H/4, W/4] in -1 .. 1."""
    blocks = F.pixel_unshuffle(clips.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1, BLOCK)
    return blocks.unflatten(0, clips.shape[:2]).transpose(1, 2).contiguous()


def to_clips(blocks: torch.Tensor) -> torch.Tensor:
    """Float blocks [B, 48, F, H/4, W/4] in -1 .. 1 to uint8 clips [B, F, H, W, 3]."""
    pixels = F.pixel_shuffle(blocks.float().transpose(1, 2), BLOCK).clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


class AutoencoderLoss(nn.Module):
    """Weighted reconstruction (absolute and squared error) plus a small KL term; a module so that gradients synchronise."""

    def __init__(self, vae: AutoencoderKLCogVideoX, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, blocks: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """blocks, weight [B, 48, F, h, w] -> (loss, mean squared error in -1 .. 1 units)."""
        posterior = self.vae.encode(blocks).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        error = decoded - blocks
        squared = error.square()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return (weight * (error.abs() + 2 * squared)).mean() + self.kl_weight * kl, squared.mean().detach()


def draw_blocks(seeds: range, object_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders clips: (blocks, weight) of AutoencoderLoss, with weight 1 + `object_weight` on objects and 2 pixels around."""
    clips = [draw_clip(seed) for seed in seeds]
    frames = render_clips(clips)
    backgrounds = np.array([COLOURS[clip.background] for clip in clips], np.uint8)[:, None, None, None]
    is_object = torch.from_numpy((frames != backgrounds).any(-1)).float()
    near = F.max_pool2d(is_object, 5, stride=1, padding=2).flatten(0, 1)[:, None]
    weight = (
        F.pixel_unshuffle(1 + object_weight * near, BLOCK).repeat(1, 3, 1, 1).unflatten(0, is_object.shape[:2]).transpose(1, 2)
    )
    return to_blocks(torch.from_numpy(frames)), weight


def train_autoencoder(recipe: MotionAutoencoderRecipe, out: Path, resume: bool) -> None:
    """Trains the inflated autoencoder of `recipe.image_vae` on renders and saves the averaged weights to `out/vae`."""
    run = Run(out, recipe, resume)
    vae = new_autoencoder()
    inflate(AutoencoderKL.from_pretrained(recipe.image_vae, dtype=torch.float32), vae)
    loss_of, optimizer = run.prepare(
        AutoencoderLoss(vae, recipe.kl_weight), recipe.lr, recipe.warmup, recipe.ema, betas=(0.9, 0.99)
    )
    smooth = 0.01
    for step in run.steps():
        first = (step * run.processes + run.rank) * recipe.batch
        blocks, weight = draw_blocks(range(first, first + recipe.batch), recipe.object_weight)
        loss, squared = loss_of(blocks.to(run.device), weight.to(run.device))
        run.update(loss, loss_of, optimizer)
        smooth += 0.02 * (float(squared) - smooth)
        run.end_step(loss=float(loss.detach()), psnr=10 * np.log10(4 / smooth))
    if run.rank == 0:
        vae.load_state_dict(run.averages[0][0].module.vae.state_dict())
        vae.register_to_config(scaling_factor=latent_scale(vae))
        vae.save_pretrained(out / "vae")


@torch.no_grad()
def latent_scale(vae: AutoencoderKLCogVideoX, clips: int = 64) -> float:
    """One over the standard deviation of the latents: what diffusers calls the scaling factor."""
    frames = np.stack([render_clip(draw_clip(seed)) for seed in range(clips)])
    return 1 / float(vae.encode(to_blocks(torch.from_numpy(frames))).latent_dist.mean.std())

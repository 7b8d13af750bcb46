"""The scenes autoencoder: diffusers' AutoencoderKL over 4x4 pixel blocks, 128 x 128 pixels to 8 x 8 x 8 latents.

Folding 4x4 pixels into channels (pixel unshuffle) before the first convolution makes it three times faster to train and
to decode than the same network at full resolution.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from tdm_train.recipes import AutoencoderRecipe
from tdm_train.run import Run
from tdm_train.scenes.world import COLOURS, draw_scene, render

BLOCK = 4


def new_autoencoder() -> AutoencoderKL:
    """An untrained scenes autoencoder: 48 channels (4 x 4 x RGB) at 32 x 32 to 8 channels at 8 x 8 and back."""
    widths = (32, 64, 128)
    vae = AutoencoderKL(
        in_channels=3 * BLOCK**2,
        out_channels=3 * BLOCK**2,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=32,
    )
    vae.set_attn_processor(AttnProcessor())
    return vae


def to_blocks(image: torch.Tensor) -> torch.Tensor:
    """uint8 images [B, H, W, 3] to float blocks [B, 48, H/4, W/4] in -1 .. 1."""
    return F.pixel_unshuffle(image.permute(0, 3, 1, 2).float() / 127.5 - 1, BLOCK).contiguous(memory_format=torch.channels_last)


def to_image(blocks: torch.Tensor) -> torch.Tensor:
    """Float blocks [B, 48, H/4, W/4] in -1 .. 1 to uint8 images [B, H, W, 3]."""
    pixels = F.pixel_shuffle(blocks.float(), BLOCK).clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class AutoencoderLoss(nn.Module):
    """Weighted reconstruction (absolute and squared error) plus a small KL term; a module so that gradients synchronise."""

    def __init__(self, vae: AutoencoderKL, recipe: AutoencoderRecipe):
        super().__init__()
        self.vae, self.kl_weight = vae, recipe.kl_weight

    def forward(self, blocks: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """blocks [B, 48, h, w], weight [B, 48, h, w] -> (loss, mean squared error in -1 .. 1 units)."""
        posterior = self.vae.encode(blocks).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        error = decoded - blocks
        squared = error.square()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return (weight * (error.abs() + 2 * squared)).mean() + self.kl_weight * kl, squared.mean().detach()


def draw_crops(first_seed: int, batch: int, size: int, object_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders scenes and cuts a `size` x `size` window around one of their objects: (blocks, weight) of AutoencoderLoss."""
    images, weights = [], []
    for seed in range(first_seed, first_seed + batch):
        scene = draw_scene(seed)
        image = render(scene)
        item, jitter = scene.items[seed % len(scene.items)], np.random.Generator(np.random.Philox(seed)).uniform(-0.4, 0.4, 2)
        left, top = (
            int(np.clip(centre * 128 - size / 2 + shift * size, 0, 128 - size))
            for centre, shift in zip((item.x, item.y), jitter, strict=True)
        )
        window = image[top : top + size, left : left + size]
        images.append(window)
        weights.append((window != np.uint8(COLOURS[scene.background])).any(-1))
    is_object = F.max_pool2d(torch.from_numpy(np.stack(weights)).float()[:, None], 5, stride=1, padding=2)
    weight = (1 + object_weight * is_object).expand(-1, 3, -1, -1)
    return to_blocks(torch.from_numpy(np.stack(images))), F.pixel_unshuffle(weight, BLOCK)


def train_autoencoder(recipe: AutoencoderRecipe, out: Path, resume: bool) -> None:
    """Trains on crops around objects, then on whole images, and saves the averaged weights to `out/vae`."""
    run = Run(out, recipe, resume)
    vae = new_autoencoder().to(memory_format=torch.channels_last)
    loss_of, optimizer = run.prepare(AutoencoderLoss(vae, recipe), recipe.lr, recipe.warmup, recipe.ema, betas=(0.9, 0.99))
    smooth = 0.01
    for step in run.steps():
        whole = step >= recipe.crop_share * recipe.iterations
        batch, size = (recipe.batch // 4, 128) if whole else (recipe.batch, 64)
        first_seed = (step * run.processes + run.rank) * recipe.batch
        blocks, weight = draw_crops(first_seed, batch, size, recipe.object_weight)
        loss, squared = loss_of(blocks.to(run.device), weight.to(run.device))
        run.update(loss, loss_of, optimizer)
        smooth += 0.02 * (float(squared) - smooth)
        run.end_step(loss=float(loss.detach()), psnr=10 * np.log10(4 / smooth))
    if run.rank == 0:
        vae.load_state_dict(run.averages[0][0].module.vae.state_dict())
        vae.register_to_config(scaling_factor=latent_scale(vae))
        vae.save_pretrained(out / "vae")


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, scenes: int = 512) -> float:
    """One over the standard deviation of the latents: what AutoencoderKL calls its scaling factor."""
    images = torch.from_numpy(np.stack([render(draw_scene(seed)) for seed in range(scenes)]))
    return 1 / float(vae.encode(to_blocks(images)).latent_dist.mean.std())

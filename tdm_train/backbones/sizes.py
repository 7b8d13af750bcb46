"""Pixels and latents: how many of the one make one of the other."""

from typing import Any


def pixel_scale(pipeline: Any) -> int:
    """Pixels along one side of a picture per latent along it.

    It is the autoencoder's own factor, times p for one that puts out p x p pixel blocks in 3 * p * p channels (see
    tdm_train/scenes/autoencoder.py).
    """
    config = pipeline.vae.config
    return int(2 ** (len(config.block_out_channels) - 1) * pixel_block(config))


def pixel_block(config: Any) -> int:
    """Side of the pixel blocks that a decoder of this configuration puts out; 1 for plain RGB. Raises ValueError."""
    block = round((config.out_channels / 3) ** 0.5)
    if 3 * block**2 != config.out_channels:
        raise ValueError(f"a decoder with {config.out_channels} output channels is neither RGB nor RGB pixel blocks")
    return int(block)


def latent_size(pipeline: Any, width: int, height: int, patch: int) -> tuple[int, int]:
    """(h, w) of the latents of a picture of width x height pixels, for a network that takes patch x patch latents at once."""
    scale = pixel_scale(pipeline)
    if width < 1 or height < 1 or width % (scale * patch) or height % (scale * patch):
        raise ValueError(f"size {width}x{height}, legal: multiples of {scale * patch} pixels")
    return height // scale, width // scale


def own_size(pipeline: Any) -> str:
    """ "WIDTHxHEIGHT" in pixels of what the pipeline's network was trained on, as its configuration says."""
    config = (getattr(pipeline, "unet", None) or pipeline.transformer).config
    width, height = (config.get(side) or config.sample_size for side in ("sample_width", "sample_height"))
    return f"{width * pixel_scale(pipeline)}x{height * pixel_scale(pipeline)}"


def refuse_frames(frames: int | None) -> None:
    """Raises ValueError where a picture is asked for a number of frames."""
    if frames is not None:
        raise ValueError(f"frames={frames}: this family makes pictures, only cogvideox makes videos")

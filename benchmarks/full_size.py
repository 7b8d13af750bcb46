"""Denoisers at the size of their authors' releases, with random weights that lie in files until they are looked at."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel, DDIMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from export.families import FAMILIES
from export.graphs import Graph
from export.precision import DTYPES
from export.student_graphs import side_dims, step_graph
from server.engine.student import Precision
from tdm_train.backbones.cogvideox import CogVideoXDenoiser
from tdm_train.backbones.pixart import PixArtDenoiser
from tdm_train.backbones.sdxl import SDXLDenoiser
from tdm_train.denoiser import Denoiser
from tdm_train.samplers import schedule_of

SHARD_BYTES = 1 << 29


@dataclass(frozen=True)
class FullSize:
    """A published denoiser. network: makes it, with the configuration of its authors; latents: the shapes it is exported for
    and proven at, the first traced; conditions: shapes of what it is told."""

    family: str
    network: Callable[..., nn.Module]
    denoiser: Callable[..., Denoiser]
    latents: tuple[tuple[int, ...], ...]
    conditions: dict[str, tuple[int, ...]]


def sdxl_unet() -> nn.Module:
    """stabilityai/stable-diffusion-xl-base-1.0."""
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def pixart_transformer(**changes: int) -> nn.Module:
    """PixArt-alpha/PixArt-XL-2-1024-MS: the class's own configuration, over T5-XXL."""
    return PixArtTransformer2DModel(caption_channels=4096, **changes)


def cogvideox_transformer(**changes: int) -> nn.Module:
    """THUDM/CogVideoX-2b: the class's own configuration but for the size of its videos, which decides no weight: positions
    are made for one size, and at 49 frames of 480 x 720 pixels a step takes a CPU hours."""
    return CogVideoXTransformer3DModel(sample_width=24, sample_height=16, sample_frames=9, **changes)


IMAGES = ((4, 16, 24), (4, 24, 16))
FULL_SIZES = {
    "pixart-xl-2": FullSize("pixart", pixart_transformer, PixArtDenoiser, IMAGES, {"text_emb": (120, 4096), "mask": (120,)}),
    "sdxl-unet": FullSize("sdxl", sdxl_unet, SDXLDenoiser, IMAGES, {"text_emb": (77, 2048), "pooled": (1280,)}),
    "cogvideox-2b": FullSize(
        "cogvideox", cogvideox_transformer, CogVideoXDenoiser, ((3, 16, 16, 24),), {"text_emb": (226, 4096)}
    ),
}


def make_weights(model: str, precision: Precision, layers: int | None, folder: Path) -> dict[str, int]:
    """Writes random weights that keep the scale of what passes through, as safetensors files."""
    network, generator = empty_network(model, layers), torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    count = parameters = 0
    for name, weight in network.named_parameters():
        shard[name] = random_weight(weight.shape, generator).to(DTYPES[precision])
        parameters += weight.numel()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            save_file(shard, folder / f"{count}.safetensors")
            shard, count = {}, count + 1
    save_file(shard, folder / f"{count}.safetensors")
    return {"parameters": parameters, "bytes": parameters * DTYPES[precision].itemsize}


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Normal with a variance of 1 / fan-in; vectors, which are biases and scales of norms, around 0 and 1 alike."""
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
    return torch.randn(shape, generator=generator).div_(math.sqrt(fan_in))


def empty_network(model: str, layers: int | None) -> nn.Module:
    """The network without memory for its weights; buffers are there."""
    with init_empty_weights():
        return FULL_SIZES[model].network(**({} if layers is None else {"num_layers": layers}))


def denoiser_graph(model: str, precision: Precision, layers: int | None, folder: Path) -> Graph:
    """One NFE of the denoiser over weights that stay in their files until they are looked at."""
    size, network = FULL_SIZES[model], empty_network(model, layers)
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    network.load_state_dict(weights, strict=False, assign=True)
    network.to(DTYPES[precision])  # the buffers
    denoiser = size.denoiser(network.eval().requires_grad_(False), schedule_of(DDIMScheduler()))
    family = FAMILIES[size.family]
    sides = side_dims(family.latent_step(network), list(size.latents))
    return step_graph(family, denoiser, size.conditions, sides, None)


@contextmanager
def float32_layer_by_layer(module: nn.Module) -> Iterator[None]:
    """While the block runs, every layer computes in float32 over its own weights, which are cast for that moment alone.

    The first weight is cast for all of the block: by it a denoiser knows in which precision to begin.
    """
    first = next(module.parameters())
    half = first.data

    def enter(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        layer.half_weights = dict(layer._parameters)
        for name, weight in layer.half_weights.items():
            if weight is not None:
                layer._parameters[name] = nn.Parameter(weight.float(), requires_grad=False)
        return tuple(one.float() if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in inputs)

    def leave(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        layer._parameters.update(layer.half_weights)
        del layer.half_weights

    layers = [layer for layer in module.modules() if layer._parameters and not list(layer.children())]
    handles = [
        handle for layer in layers for handle in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))
    ]
    first.data = half.float()
    try:
        yield
    finally:
        first.data = half
        for handle in handles:
            handle.remove()

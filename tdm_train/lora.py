"""A trained adapter -> what others open: pytorch_lora_weights.safetensors, and the network with the adapter fused into it."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from tdm_train.steps_aware import timestep_embedding


def save_adapter(
    adapter: dict[str, torch.Tensor], config: LoraConfig, component: str, folder: Path, bias: tuple[str, torch.Tensor] | None
) -> None:
    """Writes `folder`/pytorch_lora_weights.safetensors, as load_lora_weights of diffusers' pipelines opens it.

    adapter: MODULE.lora_A.weight and MODULE.lora_B.weight, of every adapted module of the pipeline's `component`. bias: a
    module and what is added to its bias, float [width]: K-conditioning of one K, for which LoRA's update alone has no room.
    """
    tensors, said = dict(adapter), config.to_dict() | {"target_modules": sorted(_modules(adapter)), "inference_mode": False}
    if bias is not None:
        tensors, said = with_bias(tensors, said, *bias)
    metadata = {f"{component}.{field}": list(value) if isinstance(value, set) else value for field, value in said.items()}
    save_file(
        {f"{component}.{name}": tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()},
        folder / LORA_WEIGHT_NAME_SAFE,
        {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, default=str)},
    )


def with_bias(
    tensors: dict[str, torch.Tensor], said: dict[str, Any], module: str, bias: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Adds `bias` to a module by peft's lora_bias, which every adapted module must then have, most of zeros."""
    for name in _modules(tensors):
        tensors[f"{name}.lora_B.bias"] = tensors[f"{name}.lora_B.weight"].new_zeros(len(tensors[f"{name}.lora_B.weight"]))
    if f"{module}.lora_A.weight" not in tensors:
        tensors[f"{module}.lora_A.weight"] = bias.new_zeros(said["r"], len(bias))
        tensors[f"{module}.lora_B.weight"] = bias.new_zeros(len(bias), said["r"])
    tensors[f"{module}.lora_B.bias"] = bias * said["r"] / said["lora_alpha"]  # peft scales it as all else
    return tensors, said | {"lora_bias": True, "target_modules": sorted(_modules(tensors))}


def _modules(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]


@torch.no_grad()
def fuse_adapter(network: nn.Module, adapter: dict[str, torch.Tensor], scale: float) -> None:
    """Adds scale * B A to the weight of every adapted module, in place. Convolutions: A is one, and B has a 1 x 1 kernel."""
    for name in _modules(adapter):
        weight = network.get_submodule(name).weight
        down, up = adapter[f"{name}.lora_A.weight"].to(weight), adapter[f"{name}.lora_B.weight"].to(weight)
        weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)


def k_bias(network: nn.Module, vector: torch.Tensor) -> tuple[str, torch.Tensor]:
    """The module, and what is added to its bias, by which a plain network behaves as at the K of `vector` [width]."""
    return f"{timestep_embedding(network)[0]}.linear_2", vector

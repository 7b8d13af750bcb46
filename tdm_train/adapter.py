"""A released file of LoRA weights -> pytorch_lora_weights.safetensors, each tensor named and checked against the network.

Layouts: diffusers, as a pipeline's save_lora_weights writes it; kohya, as sd-scripts (github.com/kohya-ss) names layers;
positional, {"decay", "ema_parameters": [tensor, ...]}, the averaged parameters in the order in which peft creates them.
"""

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tdm_train.release import Positional, Release

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
SUFFIXES = {"diffusers": (".safetensors",), "kohya": (".safetensors", *PICKLES), "positional": PICKLES}
# The tensors of an adapted module by the ends of their names: its update is alpha / rank * up @ down.
DIFFUSERS_PARTS = {"lora_A.weight": "down", "lora_B.weight": "up"}
KOHYA_PARTS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}


def write_adapter(
    weights: Path, release: Release, pipeline_class: Any, component: str, network: nn.Module, to: Path
) -> set[str]:
    """Writes `to`/pytorch_lora_weights.safetensors, which the pipeline's load_lora_weights opens, and returns the names of the
    modules that it adapts.

    component: the pipeline's name of the network; network: on the meta device, as names and shapes are all that is read; a
    positional file's adapter is left in it.
    Raises ValueError for a tensor that is unknown, missing, of the wrong shape or not finite; the order of a positional file
    is checked as far as shapes tell it.
    """
    tensors = read_tensors(weights, release.layout)
    to.mkdir(parents=True, exist_ok=True)
    match release.layout:
        case "diffusers":
            names = {f"{component}.{name}": name for name in adaptable(network)}
            modules = check_layers(weights, tensors, names, DIFFUSERS_PARTS, network)
            shutil.copyfile(weights, to / LORA_WEIGHT_NAME_SAFE)  # with its header, where the alphas are
        case "kohya":
            names = {f"lora_unet_{name.replace('.', '_')}": name for name in adaptable(network)}
            modules = check_layers(weights, tensors, names, KOHYA_PARTS, network)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / LORA_WEIGHT_NAME_SAFE)
        case "positional":
            assert release.positional is not None
            config = LoraConfig(
                r=release.positional.rank, lora_alpha=release.positional.alpha, target_modules=release.positional.modules
            )
            layers = name_parameters(weights, tensors, release.positional, config, network)
            modules = {name.rpartition(".lora_")[0] for name in layers}
            metadata = config.to_dict() | {"target_modules": sorted(release.positional.modules)}
            kept = {f"{component}_lora_layers": layers, f"{component}_lora_adapter_metadata": metadata}
            pipeline_class.save_lora_weights(to, **kept)
    return modules


def read_tensors(weights: Path, layout: str) -> Any:
    """The contents of a file of weights; pickles with nothing in them but tensors and plain containers."""
    if weights.suffix not in SUFFIXES[layout]:
        raise ValueError(f"{weights}: a file of layout {layout!r} ends in one of {', '.join(SUFFIXES[layout])}")
    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        return torch.load(weights, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{weights} is not read, as it is not a file of tensors alone: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What an unreadable file is said to hold, without PyTorch's advice to read it all the same."""
    lines = str(error).splitlines()
    return next(
        (line.strip() for line in lines if "GLOBAL" in line or "global" in line), lines[0] if lines else "it ends early"
    )


def adaptable(network: nn.Module) -> list[str]:
    """The names of the modules that a LoRA can adapt."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def check_layers(weights: Path, tensors: Any, names: dict[str, str], parts: dict[str, str], network: nn.Module) -> set[str]:
    """The names of the modules that `tensors` adapt. names: how the layout calls each module of the network; parts: the ends of
    the tensors' names."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _named_tensors(weights, tensors):
        layer, part = next(((key.removesuffix(f".{end}"), parts[end]) for end in parts if key.endswith(f".{end}")), (key, ""))
        if layer not in names:
            raise ValueError(
                f"{weights}: {key} is no layer of the base's {type(network).__name__}; legal are for example "
                f"{next(iter(names))} with {', '.join(f'.{end}' for end in parts)}"
            )
        layers.setdefault(layer, {})[part] = tensor
    for layer, found in layers.items():
        for end, part in parts.items():
            if part not in found:
                raise ValueError(f"{weights}: {layer}.{end} is missing")
            needed = needed_shape(network.get_submodule(names[layer]), part, rank=found["down"].shape[0])
            _refuse_shape(f"{weights}: {layer}.{end}", found[part], names[layer], needed)
    return {names[layer] for layer in layers}


def needed_shape(module: nn.Module, part: str, rank: int) -> tuple[int, ...]:
    """The shape of a part of the LoRA of a linear layer or a convolution."""
    assert isinstance(module.weight, torch.Tensor)
    outputs, *inputs = module.weight.shape
    return {"down": (rank, *inputs), "up": (outputs, rank, *(1,) * (len(inputs) - 1)), "alpha": ()}[part]


def name_parameters(
    weights: Path, contents: Any, positional: Positional, config: LoraConfig, network: nn.Module
) -> dict[str, torch.Tensor]:
    """Tensors of a positional file by name: as peft names the parameters that it creates in `network`, in that order."""
    found = contents.get("ema_parameters") if isinstance(contents, dict) else None
    if not isinstance(found, list) or contents.keys() != {"decay", "ema_parameters"}:
        said = list(contents) if isinstance(contents, dict) else type(contents).__name__
        raise ValueError(f"{weights} holds {said}, legal: 'decay' and 'ema_parameters', a list of tensors")
    for end in positional.modules:
        if not any(f".{name}".endswith(f".{end}") for name in adaptable(network)):
            raise ValueError(f"the base's {type(network).__name__} has no module {end!r}, which positional.modules names")
    inject_adapter_in_model(config, network)
    needed = {
        name.replace(".default.", "."): tuple(parameter.shape)
        for name, parameter in network.named_parameters()
        if ".lora_" in name
    }
    if len(found) != len(needed):
        raise ValueError(
            f"{weights}: ema_parameters holds {len(found)} tensors, the base's {type(network).__name__} needs {len(needed)}: "
            f"two for each of {len(needed) // 2} modules"
        )
    tensors = _named_tensors(weights, {f"ema_parameters[{index}]": tensor for index, tensor in enumerate(found)})
    layers = {}
    for (position, tensor), (name, shape) in zip(tensors, needed.items(), strict=True):
        _refuse_shape(f"{weights}: {position}", tensor, name.removesuffix(".weight"), shape)
        layers[name] = tensor
    return layers


def _named_tensors(weights: Path, tensors: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors; raises ValueError for what is no dictionary of finite floating-point tensors, or empty."""
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError(f"{weights} holds no tensors by name")
    for name, tensor in tensors.items():
        # sd-scripts may write a whole alpha
        if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or tensor.ndim == 0):
            said = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{weights}: {name} is {said}, legal: a tensor of floating-point numbers")
        if not tensor.isfinite().all():
            raise ValueError(f"{weights}: {name} has values that are not finite")
        yield name, tensor


def _refuse_shape(what: str, tensor: torch.Tensor, module: str, needed: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != needed:
        found, wanted = (" x ".join(map(str, shape)) or "one number" for shape in (tensor.shape, needed))
        raise ValueError(f"{what} is {found}, {module} needs {wanted}")

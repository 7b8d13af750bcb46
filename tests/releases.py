"""Synthetic releases: adapters of random weights over the miniatures, in files as their authors' tools write them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from tdm_train.release import Positional, Release
from tdm_train.released import COGVIDEOX, DREAMSHAPER, SD3, SD3_5
from tests.miniatures import FRAMES, HEIGHT, PROMPTS, T5_LENGTH, WIDTH

RANK = 4
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# As the training script of LCM's LoRA has it (diffusers' examples), whose kohya-style file the Dreamshaper release follows.
UNET_MODULES = [
    *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]
# What of the published schedulers' scheduler_config.json says more than the class's defaults.
SANA_SCHEDULER = {"flow_shift": 3.0, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
SD15_SCHEDULER = {
    **{"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000},
    **{"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False},
}


def small(release: Release, network: dict[str, Any], text_length: int, positional: Positional | None = None) -> Release:
    """A preset over a miniature: all that says how the student is run is left as it is."""
    video = {"frames": FRAMES} if release.student.frames else {}
    sizes = {"sizes": [f"{WIDTH}x{HEIGHT}"], "text_length": text_length, **video}
    student = release.student.model_copy(update=sizes)
    return release.model_copy(update={"network": network, "student": student, "positional": positional})


RELEASES = {
    "TDM_sd3_lora": small(SD3, {"num_layers": 2, "qk_norm": "rms_norm"}, T5_LENGTH),
    "TDM_sd3-5_lora": small(
        SD3_5, {"num_layers": 2}, T5_LENGTH, Positional(rank=RANK, alpha=2 * RANK, modules=SD3_5.positional.modules)
    ),
    "TDM_dreamshaper_LoRA": small(DREAMSHAPER, {"block_out_channels": [8, 16]}, 77),
    "TDM_CogVideoX-2B_LoRA": small(COGVIDEOX, {"use_rotary_positional_embeddings": False}, T5_LENGTH),
}
BASES = {
    "TDM_sd3_lora": "sd3",
    "TDM_sd3-5_lora": "sd3",
    "TDM_dreamshaper_LoRA": "stable_diffusion",
    "TDM_CogVideoX-2B_LoRA": "cogvideox_2b",
}
SCHEDULERS = {
    "TDM_sd3_lora": SANA_SCHEDULER | {"flow_shift": 6},
    "TDM_sd3-5_lora": SANA_SCHEDULER | {"flow_shift": 3},
    "TDM_dreamshaper_LoRA": SD15_SCHEDULER,
}


def adapted(network: nn.Module, modules: list[str], alpha: int) -> nn.Module:
    """`network` under peft, with an adapter "tdm" whose every parameter is random, as after training."""
    wrapped = get_peft_model(
        network, LoraConfig(r=RANK, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=modules), adapter_name="tdm"
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "tdm" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def kohya_names(wrapped: nn.Module, alpha: int) -> dict[str, torch.Tensor]:
    """The adapter's tensors as sd-scripts names them, in half precision, with an alpha for each layer."""
    tensors = {}
    for key, tensor in get_peft_model_state_dict(wrapped, adapter_name="tdm").items():
        layer, end = key.removeprefix("base_model.model.").split(".lora_")
        stem = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{stem}.lora_{'down' if end == 'A.weight' else 'up'}.weight"] = tensor.half()
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def write_release(name: str, base: Path, folder: Path) -> Path:
    """The file of the release `name` over the miniature in `base`."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    if name == "TDM_sd3-5_lora":
        wrapped = adapted(pipeline.transformer, SD3_5.positional.modules, 2 * RANK)
        averages = [parameter.detach().clone() for key, parameter in wrapped.named_parameters() if "tdm" in key]
        torch.save({"decay": 0.9, "ema_parameters": averages}, folder / "tdm_sd3-5_lora.ckpt")
        return folder / "tdm_sd3-5_lora.ckpt"
    if name == "TDM_dreamshaper_LoRA":
        torch.save(kohya_names(adapted(pipeline.unet, UNET_MODULES, RANK), RANK // 2), folder / "tdm_dreamshaper.pt")
        return folder / "tdm_dreamshaper.pt"
    wrapped = adapted(pipeline.transformer, ATTENTION, RANK)
    layers = get_peft_model_state_dict(wrapped, adapter_name="tdm")
    layers = {key.removeprefix("base_model.model."): tensor for key, tensor in layers.items()}
    type(pipeline).save_lora_weights(folder, transformer_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


def as_authors_run_it(name: str, base: Path, weights: Path, scale: float) -> Any:
    """The base with the release beside its weights, not fused, by the calls of the authors' own examples."""
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    if name == "TDM_sd3-5_lora":
        wrapped = adapted(pipeline.transformer, SD3_5.positional.modules, 2 * RANK)
        mine = [parameter for key, parameter in wrapped.named_parameters() if "tdm" in key]
        for parameter, average in zip(mine, torch.load(weights)["ema_parameters"], strict=True):
            parameter.data.copy_(average)
        for module in wrapped.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("tdm", scale)
    else:
        held = torch.load(weights) if weights.suffix == ".pt" else str(weights)
        pipeline.load_lora_weights(held, adapter_name="tdm")
        pipeline.set_adapters(["tdm"], [scale])
    if name in SCHEDULERS:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(SCHEDULERS[name])
    for part in ("unet", "transformer"):
        if hasattr(pipeline, part):
            getattr(pipeline, part).float()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, name: str) -> torch.Tensor:
    """What a pipeline makes of PROMPTS in 4 NFE at guidance 1."""
    options: dict[str, Any] = {} if hasattr(pipeline, "unet") else {"max_sequence_length": T5_LENGTH}
    if BASES[name] == "cogvideox_2b":
        options["num_frames"] = FRAMES
    size = {"width": WIDTH, "height": HEIGHT, "guidance_scale": 1.0, "num_inference_steps": 4}
    noise = torch.Generator().manual_seed(7)
    made: torch.Tensor = pipeline(PROMPTS, generator=noise, output_type="latent", return_dict=False, **size, **options)[0]
    return made

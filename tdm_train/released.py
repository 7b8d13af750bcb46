"""The TDM students that were released on the model hub (Luo-Yihong/*): what each stands on, and how its authors run it.

As their README and training code say (github.com/Luo-Yihong/TDM and TDM-R1).
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tdm_train.description import Description, first_error
from tdm_train.release import Positional, Release


def flow_dpm_solver(flow_shift: float) -> dict[str, Any]:
    """DPM-Solver++ of second order over flow sigmas, as Sana's folder on the hub has it, from where the authors take it."""
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": flow_shift,
        "solver_order": 2,
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
    }


def four_steps(released: str, **fields: Any) -> Description:
    """The student.json of a release for 4 NFE."""
    training = {"method": "TDM (arXiv 2503.06674)", "released": released}
    return Description(nfe=[4], default_nfe=4, k_conditioning=False, training=training, **fields)


SD3 = Release(
    layout="diffusers",
    pipeline="StableDiffusion3Pipeline",
    network={"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 16, "qk_norm": None},
    sampler=flow_dpm_solver(flow_shift=6.0),
    grid="sampler",
    guidance_scale=1,
    student=four_steps(
        "Luo-Yihong/TDM_sd3_lora",
        name="tdm-sd3",
        family="sd3",
        base="stabilityai/stable-diffusion-3-medium-diffusers",
        revision="main",
        text_length=256,
        sizes=["1024x1024"],
        adapter_scale=0.125,
    ),
)

# Sampler, text length and size are those of TDM-R1's training code, which starts from this file. Its modules are those of
# `attn` alone: 3.5 Medium has `attn2` with projections of the same names, which have no adapter.
SD3_5 = Release(
    layout="positional",
    positional=Positional(
        rank=32,
        alpha=64,
        modules=[
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        ],
    ),
    pipeline="StableDiffusion3Pipeline",
    network={"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "in_channels": 16, "qk_norm": "rms_norm"},
    sampler=flow_dpm_solver(flow_shift=3.0),
    grid="sampler",
    guidance_scale=1,
    student=four_steps(
        "Luo-Yihong/TDM_sd3-5_lora",
        name="tdm-sd3.5",
        family="sd3",
        base="stabilityai/stable-diffusion-3.5-medium",
        revision="main",
        text_length=128,
        sizes=["512x512"],
        adapter_scale=1.0,
    ),
)

# The sampler is what DPMSolverMultistepScheduler makes of Stable Diffusion 1.5's scheduler_config.json.
DREAMSHAPER = Release(
    layout="kohya",
    pipeline="StableDiffusionPipeline",
    network={"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "in_channels": 4},
    sampler={
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "epsilon",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "solver_order": 2,
        "timestep_spacing": "linspace",
        "steps_offset": 1,
        "final_sigmas_type": "zero",
    },
    grid="sampler",
    guidance_scale=1,
    student=four_steps(
        "Luo-Yihong/TDM_dreamshaper_LoRA",
        name="tdm-dreamshaper",
        family="stable_diffusion",
        base="lykon/dreamshaper-7",
        revision="main",
        text_length=77,
        sizes=["512x512"],
        adapter_scale=1.0,
    ),
)

# The sampler is the base's own; the authors say that its uniform steps are not the timesteps they trained on.
COGVIDEOX = Release(
    layout="diffusers",
    pipeline="CogVideoXPipeline",
    network={"num_layers": 30, "num_attention_heads": 30, "attention_head_dim": 64, "use_rotary_positional_embeddings": False},
    sampler={
        "_class_name": "CogVideoXDDIMScheduler",
        "prediction_type": "v_prediction",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "snr_shift_scale": 3.0,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
    },
    grid="timesteps",
    guidance_scale=1,
    student=four_steps(
        "Luo-Yihong/TDM_CogVideoX-2B_LoRA",
        name="tdm-cogvideox-2b",
        family="cogvideox",
        base="THUDM/CogVideoX-2b",
        revision="main",
        text_length=226,
        sizes=["720x480"],
        frames=49,
        fps=8,
        timesteps={4: [999.0, 856.0, 665.0, 399.0]},
        adapter_scale=1.0,
    ),
)

PRESETS = {
    "TDM_sd3_lora": SD3,
    "TDM_sd3-5_lora": SD3_5,
    "TDM_dreamshaper_LoRA": DREAMSHAPER,
    "TDM_CogVideoX-2B_LoRA": COGVIDEOX,
}


def read_release(source: str) -> Release:
    """A preset by its name, or a TOML file of Release's fields; raises ValueError in one line, naming the field."""
    if source in PRESETS:
        return PRESETS[source]
    if not source.endswith(".toml"):
        raise ValueError(f"release {source!r}, legal: {', '.join(PRESETS)}, or a .toml file of the same fields")
    try:
        return Release.model_validate_json(json.dumps(tomllib.loads(Path(source).read_text(encoding="utf-8"))))
    except ValidationError as error:
        raise ValueError(f"{source}: {first_error(error, Release)}") from None
    except ValueError as error:
        raise ValueError(f"{source} is not TOML: {error}") from None

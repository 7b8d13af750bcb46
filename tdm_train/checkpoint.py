"""The student folder: a diffusers pipeline with the largest K folded in, plus `student.json` and the K vectors.

`DiffusionPipeline.from_pretrained` opens the folder and samples at that K; `load_student` restores every K.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file

from tdm_train.denoiser import PixArtDenoiser
from tdm_train.schedule import NoiseSchedule
from tdm_train.steps_aware import fold, unfold

FORMAT = 1
K_VECTORS = "k_conditioning.safetensors"


@dataclass(frozen=True)
class Student:
    """An opened student folder: the pipeline (its transformer steps-aware), the denoiser over it, and student.json."""

    pipeline: PixArtSigmaPipeline
    denoiser: PixArtDenoiser
    description: dict[str, Any]

    @property
    def nfe_set(self) -> tuple[int, ...]:
        return tuple(self.description["nfe"])


def open_teacher(folder: Path) -> PixArtSigmaPipeline:
    """Opens a teacher (a diffusers folder of PixArt classes) in float32, with the plain attention that is fast on CPU."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a diffusers folder: it has no model_index.json")
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    pipeline.transformer.set_attn_processor(AttnProcessor())
    pipeline.vae.set_attn_processor(AttnProcessor())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def schedule_of(pipeline: PixArtSigmaPipeline) -> NoiseSchedule:
    """The noise schedule that a pipeline's diffusers scheduler states."""
    config = pipeline.scheduler.config
    if config.prediction_type == "flow_prediction":
        return NoiseSchedule("flow_prediction")
    return NoiseSchedule(config.prediction_type, pipeline.scheduler.alphas_cumprod.float())


def student_sampler() -> DPMSolverMultistepScheduler:
    """The student's deterministic sampler in diffusers' terms: DPM-Solver++ of first order (= DDIM) over flow sigmas."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=1, final_sigmas_type="zero"
    )


def save_student(
    teacher: PixArtSigmaPipeline, transformer: PixArtTransformer2DModel, description: dict[str, Any], folder: Path
) -> None:
    """Writes the student folder in half precision. `transformer` is steps-aware and is left folded to its largest K."""
    vectors = fold(transformer, max(description["nfe"]))
    components = {**teacher.components, "transformer": transformer, "scheduler": student_sampler()}
    PixArtSigmaPipeline(**components).to(torch.float16).save_pretrained(folder)
    save_file({"k_embedding": vectors.half().contiguous().cpu()}, folder / K_VECTORS)
    (folder / "student.json").write_text(json.dumps({"format": FORMAT, **description}, indent=1) + "\n")


def load_student(folder: Path) -> Student:
    """Opens a student folder in float32 with its K-conditioning in place."""
    if not (folder / "student.json").is_file():
        raise ValueError(f"{folder} is not a student folder: it has no student.json (fewstep train scenes_tdm makes one)")
    description = json.loads((folder / "student.json").read_text())
    if description.get("format") != FORMAT:
        raise ValueError(f"{folder}/student.json has format {description.get('format')!r}, this version reads {FORMAT}")
    pipeline = open_teacher(folder)
    unfold(pipeline.transformer, load_file(folder / K_VECTORS)["k_embedding"].float(), max(description["nfe"]))
    return Student(pipeline, PixArtDenoiser(pipeline.transformer, schedule_of(pipeline)), description)

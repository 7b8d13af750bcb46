"""Diffusers folders in, student folders in and out.

A student folder is a diffusers pipeline with the largest K folded in, plus `student.json` and, with K-conditioning, the K
vectors. `DiffusionPipeline.from_pretrained` opens it and samples at that K; `load_student` restores every K.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from tdm_train.backbones import backbone_named, backbone_of
from tdm_train.denoiser import Denoiser
from tdm_train.description import Description, read_description
from tdm_train.plain_attention import plain_attention
from tdm_train.samplers import sampler_grid, student_sampler
from tdm_train.steps_aware import StepsAwareEmbedding, fold, timestep_embedding, unfold

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
K_VECTORS = "k_conditioning.safetensors"


@dataclass(frozen=True)
class Student:
    """An opened student folder: the pipeline (its network steps-aware, if it is), the denoiser over it, and student.json."""

    pipeline: Any
    denoiser: Denoiser
    description: Description

    @property
    def nfe_set(self) -> tuple[int, ...]:
        return tuple(self.description.nfe)

    def grid(self, nfe: int) -> torch.Tensor:
        """The timesteps of a trajectory, rising from 0: float32 [nfe + 1], as student.json states them or the sampler has them.

        Raises ValueError for sigmas with a sampler that does not take them.
        """
        timesteps, sigmas = self.description.grid(nfe)
        return torch.tensor([0.0, *reversed(timesteps or sampler_grid(self.pipeline.scheduler, nfe, sigmas))])


def pipeline_config(source: Path | str, revision: str | None = None) -> dict[str, Any]:
    """model_index.json of a diffusers folder, or of a hub id ("owner/name") at a revision, of a class that tdm_train/backbones
    knows; raises ValueError for any other."""
    folder = Path(source)
    if not (folder / "model_index.json").is_file() and (folder.exists() or not HUB_ID.fullmatch(str(source))):
        raise ValueError(f"{source} is not a diffusers folder: it has no model_index.json")
    if folder.exists():
        refuse_missing_parts(folder)
    try:
        config: dict[str, Any] = DiffusionPipeline.load_config(str(source), revision=revision)
    except OSError as error:
        raise ValueError(f"{source} cannot be opened as a diffusers pipeline: {error}") from None
    backbone_named(config["_class_name"])
    return config


def open_pipeline(source: Path | str, revision: str | None = None) -> Any:
    """Opens a diffusers folder, or a hub id at a revision, of a class that tdm_train/backbones knows, in float32.

    Weights are read from safetensors alone. Without a GPU it gets the plain attention, which is faster on CPU. Raises
    ValueError for what is no pipeline or one of another class, before any weights are read.
    """
    pipeline_config(source, revision)
    try:
        options = {"dtype": torch.float32, "use_safetensors": True}
        pipeline = DiffusionPipeline.from_pretrained(str(source), revision=revision, **options)
    except OSError as error:
        raise ValueError(f"{source} cannot be opened as a diffusers pipeline, from here or from the hub: {error}") from None
    if not torch.cuda.is_available():
        plain_attention(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refuse_missing_parts(folder: Path) -> None:
    """Raises ValueError where a diffusers folder lacks a part that its model_index.json lists."""
    listed = json.loads((folder / "model_index.json").read_text())
    parts = [name for name, kind in listed.items() if isinstance(kind, list) and kind[0] is not None]
    if missing := [name for name in parts if not (folder / name).is_dir()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its model_index.json lists; save or copy it whole")


def denoiser_of(pipeline: Any) -> Denoiser:
    """The denoiser over an open pipeline's network, under the noise schedule that the pipeline's scheduler states."""
    denoiser: Denoiser = backbone_of(pipeline).denoiser_of(pipeline)
    return denoiser


def save_student(
    teacher: Any,
    network: nn.Module,
    description: Description,
    folder: Path,
    sampler: Any = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes the student folder with weights of `dtype`: the teacher's pipeline with `network` in place of its own.

    network: left folded to its largest K where it is steps-aware, as `description` must say it is. sampler: the diffusers
    scheduler that the student is to be run with; the one of tdm_train/samplers.py where none is given. The teacher's parts
    are left in `dtype`.
    """
    backbone = backbone_of(teacher)
    steps_aware = isinstance(timestep_embedding(network)[1], StepsAwareEmbedding)
    assert (description.family, description.k_conditioning) == (backbone.FAMILY, steps_aware)
    nfe = max(description.nfe)
    vectors = fold(network, nfe)[: nfe + 1] if steps_aware else None  # without the rungs of a ladder
    parts = {backbone.NETWORK: network, "scheduler": sampler or student_sampler(teacher.scheduler)}
    type(teacher).from_pipe(teacher, dtype=dtype, **parts).save_pretrained(folder)
    if vectors is not None:
        save_file({"k_embedding": vectors.to(dtype).contiguous().cpu()}, folder / K_VECTORS)
    description.write(folder)


def load_student(folder: Path) -> Student:
    """Opens a student folder in float32 with its K-conditioning in place and the scheduler that the folder states."""
    description = read_description(folder)
    if description.k_conditioning != (folder / K_VECTORS).is_file():
        there = "lacks" if description.k_conditioning else "has"
        raise ValueError(f"{folder} {there} {K_VECTORS}, but its student.json says k_conditioning={description.k_conditioning}")
    pipeline = open_pipeline(folder)
    family = backbone_of(pipeline).FAMILY
    if family != description.family:
        raise ValueError(f"{folder}/student.json says family {description.family!r}, its pipeline is of {family!r}")
    denoiser = denoiser_of(pipeline)
    if description.k_conditioning:
        vectors = load_file(folder / K_VECTORS)["k_embedding"].float()
        if len(vectors) != max(description.nfe) + 1:
            raise ValueError(
                f"{folder / K_VECTORS} has {len(vectors)} vectors, nfe {description.nfe} needs {max(description.nfe) + 1}"
            )
        unfold(denoiser.network, vectors, max(description.nfe))
    return Student(pipeline, denoiser, description)

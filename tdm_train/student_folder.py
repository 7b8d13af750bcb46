"""What a run of TDM ends in: the student folder, with a student.json that says how the student must be run."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tdm_train.backbones import backbone_of
from tdm_train.backbones.sizes import own_size
from tdm_train.checkpoint import HUB_ID, denoiser_of, open_pipeline, save_student
from tdm_train.description import Description, read_description
from tdm_train.durable import publish
from tdm_train.lora import fuse_adapter, k_bias, save_adapter
from tdm_train.roles import lora_config
from tdm_train.samplers import sampler_grid, student_sampler
from tdm_train.shared_base import SharedRole
from tdm_train.steps_aware import give_k_vectors
from tdm_train.tdm_recipe import TdmRecipe


def write_student(recipe: TdmRecipe, student: nn.Module, out: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes `out`/student with weights of `dtype`, whole or not at all: the teacher's pipeline, opened afresh with all its
    parts, and the student in it."""
    pipeline, fresh = open_pipeline(recipe.teacher, recipe.revision), out / ".student.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    network = fused(recipe, student, pipeline, fresh) if isinstance(student, SharedRole) else student.network.cpu()
    save_student(pipeline, network, describe(recipe, pipeline), fresh, dtype=dtype)
    publish(fresh, out / "student")


def fused(recipe: TdmRecipe, student: SharedRole, pipeline: Any, folder: Path) -> nn.Module:
    """The pipeline's network with the student's adapter fused in, steps-aware as the student is; the adapter by itself goes to
    `folder`/pytorch_lora_weights.safetensors, with the largest K folded in."""
    backbone, config = backbone_of(pipeline), lora_config(recipe)
    network: nn.Module = getattr(pipeline, backbone.NETWORK)
    adapter = {name: value.detach().float().cpu() for name, value in zip(student.names, student.own, strict=True)}
    vectors, nfe = adapter.pop("k_embedding", None), max(recipe.nfe)
    save_adapter(adapter, config, backbone.NETWORK, folder, None if vectors is None else k_bias(network, vectors[nfe]))
    fuse_adapter(network, adapter, recipe.alpha / recipe.rank)
    if vectors is not None:
        give_k_vectors(network, vectors)
    return network


def describe(recipe: TdmRecipe, pipeline: Any) -> Description:
    """What student.json says of how the student of `pipeline` is made and must be run."""
    before = {"start": read_description(Path(recipe.start)).training} if recipe.start else {}
    hub_id = HUB_ID.fullmatch(recipe.teacher) and not Path(recipe.teacher).exists()
    return Description(
        name=recipe.name,
        family=backbone_of(pipeline).FAMILY,
        base=recipe.base or (recipe.teacher if hub_id else Path(recipe.teacher).resolve().name),
        revision=recipe.revision,
        nfe=sorted(recipe.nfe),
        default_nfe=max(recipe.nfe),
        text_length=recipe.text_length,
        sizes=[recipe.sizes[-1] if recipe.sizes else own_size(pipeline)],
        frames=recipe.frames or None,
        fps=recipe.fps or None,
        **stated_grids(recipe, pipeline),
        k_conditioning=recipe.steps_aware,
        adapter_scale=None if recipe.weights == "full" else 1.0,
        training={"method": "TDM (arXiv 2503.06674)" + ", steps-aware" * recipe.steps_aware, **recipe.objective(), **before},
    )


def stated_grids(recipe: TdmRecipe, pipeline: Any) -> dict[str, dict[int, list[float]]]:
    """`timesteps` or `sigmas` of student.json, by NFE and falling: the grids that are not the student's sampler's own.

    They are sigmas for a flow-match sampler that shifts them, which must be told what it has to shift.
    """
    sampler, schedule = student_sampler(pipeline.scheduler), denoiser_of(pipeline).schedule
    shift = getattr(sampler.config, "shift", None) or 1.0
    stated = {}
    for nfe in recipe.nfe:
        times = recipe.grid(nfe)[:0:-1]
        if schedule.alphas_cumprod is not None:
            times = [float(int(t)) for t in times]  # of t only the whole part counts
        if not np.allclose(times, sampler_grid(sampler, nfe), rtol=0, atol=1e-3):
            stated[nfe] = [unshifted(t / schedule.train_timesteps, shift) for t in times] if shift != 1 else times
    return {"timesteps" if shift == 1 else "sigmas": stated} if stated else {}


def unshifted(sigma: float, shift: float) -> float:
    """What a sampler shifts to `sigma` by shift*u / (1 + (shift - 1)*u)."""
    return sigma / (shift - (shift - 1) * sigma)

"""What must be known of a released adapter (LoRA) to make a student folder of it, strictly."""

import inspect
from typing import Annotated, Any, Literal

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from tdm_train.backbones import backbone_named
from tdm_train.description import Description

SAMPLERS = {
    sampler.__name__: sampler
    for sampler in (
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
}


class Positional(BaseModel):
    """The LoRA whose parameters a positional file lists, as peft's LoraConfig has it: rank, alpha, and the names that the
    adapted modules end in."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rank: PositiveInt
    alpha: PositiveInt
    modules: Annotated[list[str], Field(min_length=1)]


class Release(BaseModel):
    """A released adapter. There are no defaults: what is not stated here is not known, and is refused.

    layout: of the file of weights, see tdm_train/adapter.py; positional: what its names are made of, for that layout alone.
    pipeline: the diffusers pipeline class of the base; network: values that the configuration of its network must have.
    sampler: the diffusers scheduler that the student is run with, as a scheduler_config.json has it; fields left out have the
    class's own defaults. grid: where its evaluations lie: at the sampler's own steps, or at the student's timesteps or sigmas.
    guidance_scale: 1, as a student takes no guidance.
    student: the student.json of the student to be made, with the scale of the adapter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layout: Annotated[Literal["diffusers", "kohya", "positional"], Field(examples=["diffusers"])]
    positional: Positional | None = None
    pipeline: Annotated[str, Field(examples=["StableDiffusion3Pipeline"])]
    network: Annotated[dict[str, Any], Field(min_length=1, examples=[{"num_layers": 24}])]
    sampler: Annotated[dict[str, Any], Field(examples=[{"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 6.0}])]
    grid: Annotated[Literal["sampler", "timesteps", "sigmas"], Field(examples=["sampler"])]
    guidance_scale: Annotated[Literal[1], Field(examples=[1])]
    student: Description

    @field_validator("sampler")
    @classmethod
    def sampler_is_known(cls, sampler: dict[str, Any]) -> dict[str, Any]:
        """Raises ValueError for a class or a field that no sampler here has: diffusers itself would drop the field."""
        name = sampler.get("_class_name")
        if name not in SAMPLERS:
            raise ValueError(f"_class_name={name!r}, legal: {', '.join(SAMPLERS)}")
        legal = set(inspect.signature(SAMPLERS[name].__init__).parameters) - {"self"}
        for unknown in sampler.keys() - legal - {"_class_name"}:
            raise ValueError(f"{name} has no field {unknown!r}, legal: {', '.join(sorted(legal))}")
        return sampler

    @model_validator(mode="after")
    def agrees_with_itself(self) -> "Release":
        """Raises ValueError where two fields contradict each other."""
        family = backbone_named(self.pipeline).FAMILY
        if self.student.family != family:
            raise ValueError(f"student.family is {self.student.family!r}, but {self.pipeline} is of family {family!r}")
        if self.student.adapter_scale is None or self.student.k_conditioning:
            raise ValueError("an adapter has student.adapter_scale, for example 1.0, and student.k_conditioning = false")
        if (self.layout == "positional") != (self.positional is not None):
            raise ValueError(f"positional goes with layout 'positional' and with no other, got layout {self.layout!r}")
        for field in ("timesteps", "sigmas"):
            grid = getattr(self.student, field)
            if (grid is not None) != (self.grid == field) or (grid is not None and sorted(grid) != self.student.nfe):
                raise ValueError(f"grid={self.grid!r}, nfe {self.student.nfe} and student.{field} {grid} do not agree")
        return self

    def new_sampler(self) -> Any:
        """The diffusers scheduler that `sampler` describes."""
        return SAMPLERS[self.sampler["_class_name"]].from_config(self.sampler)

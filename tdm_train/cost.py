"""What a distillation costs, before it is paid: parameters, memory, evaluations, FLOPs and hours, from config.json alone."""

import inspect
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tdm_train.adopt import class_of
from tdm_train.backbones import backbone_named, backbone_of
from tdm_train.backbones.sizes import own_size
from tdm_train.checkpoint import denoiser_of, pipeline_config
from tdm_train.roles import Role, full_copies, shared_roles
from tdm_train.shared_base import SharedRole
from tdm_train.tdm_recipe import TdmRecipe
from tdm_train.texts import latent_shape
from tdm_train.trainer import refuse_other_family, refuse_what_the_teacher_cannot_do

Gpu = Literal["h200", "h100", "a800", "4090"]
TFLOPS = {"h200": 989.0, "h100": 989.0, "a800": 312.0, "4090": 165.0}  # dense bf16, as NVIDIA states them (H: SXM)
UTILISATION = 0.35  # assumed: what well-kept training code reaches of them


@dataclass(frozen=True)
class RoleCost:
    """Of one role: parameters held for it alone, how many of them are trained, and bytes."""

    role: str
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimiser: int
    ema: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.ema


@dataclass(frozen=True)
class Cost:
    """Of a recipe: its roles; mean evaluations of networks per iteration and sample, without those that gradient checkpointing
    repeats; FLOPs per iteration of `samples` samples, with them."""

    roles: list[RoleCost]
    forwards: float
    backwards: int
    samples: int
    flops: float
    iterations: int

    def hours(self, gpu: Gpu) -> float:
        """Hours of one such GPU for the whole run, at the assumed utilisation."""
        return self.flops * self.iterations / (TFLOPS[gpu] * 1e12 * UTILISATION * 3600)


def cost_of(recipe: TdmRecipe, processes: int) -> Cost:
    """The cost of a recipe; raises ValueError for a teacher that the recipe cannot train. No weights are read."""
    refuse_other_family(recipe)
    pipeline = weightless_pipeline(recipe)
    refuse_what_the_teacher_cannot_do(recipe, pipeline)
    denoiser = denoiser_of(pipeline).requires_grad_(False).to("meta")
    roles = (full_copies if recipe.weights == "full" else shared_roles)(denoiser, recipe)
    steps = range(max(recipe.iterations, 1))
    nfe = float(np.mean([np.average(recipe.nfe_at(step), weights=recipe.shares_at(step) or None) for step in steps]))
    regularised = recipe.fake_loss == "velocity" and recipe.teacher_weight > 0
    samples = recipe.batch * recipe.accumulation * processes
    flops = np.mean([sample_flops(pipeline, roles, recipe, size, nfe, regularised) for size in recipe.sizes or (None,)])
    held = [role_cost(name, role, recipe) for name, role in zip(("teacher", "student", "fake score"), roles, strict=True)]
    forwards = recipe.fake_updates * (rolled(nfe) + 1 + regularised) + 1 + 2 + 1
    return Cost(held, forwards, recipe.fake_updates + 1, samples, float(flops) * samples, recipe.iterations)


def weightless_pipeline(recipe: TdmRecipe) -> Any:
    """The teacher's pipeline with its network and autoencoder on the meta device, its scheduler, and no text encoders."""
    source, options = recipe.teacher, {"revision": recipe.revision}
    config = pipeline_config(source, recipe.revision)
    kind, network = getattr(diffusers, config["_class_name"]), backbone_named(config["_class_name"]).NETWORK
    needed = [name for name, value in inspect.signature(kind.__init__).parameters.items() if value.default is value.empty]
    parts: dict[str, Any] = dict.fromkeys(set(needed) - {"self"})
    with torch.device("meta"):
        for name in (network, "vae"):
            part = class_of(config, name)
            parts[name] = part.from_config(part.load_config(source, subfolder=name, **options))
    parts["scheduler"] = class_of(config, "scheduler").from_pretrained(source, subfolder="scheduler", **options)
    return kind(**parts)


def role_cost(name: str, role: Role, recipe: TdmRecipe) -> RoleCost:
    """Weights as they lie in memory; gradients, both of AdamW's moments and the average are float32. The teacher of shared
    weights is the base under the other two."""
    held = list(base_parameters(role) if isinstance(role, SharedRole) and name == "teacher" else role.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in held)
    parameters = sum(parameter.numel() for parameter in held)
    trained = 0 if name == "teacher" else parameters
    averaged = name == "student" and recipe.ema > 0
    return RoleCost(name, parameters, trained, weights, 4 * trained, 8 * trained, 4 * trained * averaged)


def base_parameters(role: SharedRole) -> Iterator[nn.Parameter]:
    role.base.act_as("teacher")
    own = {id(parameter) for parameter in role.base.adapters()}
    return (parameter for parameter in role.base.denoiser.network.parameters() if id(parameter) not in own)


def sample_flops(
    pipeline: Any, roles: tuple[Role, Role, Role], recipe: TdmRecipe, size: str | None, nfe: float, regularised: bool
) -> float:
    """FLOPs of one sample in an iteration: rollout and trained step of every fake score's update, the student's trained step,
    the guided teacher, and the fake score's answer."""
    shape = (1, *latent_shape(recipe, pipeline, size or own_size(pipeline)))
    teacher, student, _ = (evaluation_flops(pipeline, role, recipe, shape, trained=False) for role in roles)
    trained = evaluation_flops(pipeline, roles[1], recipe, shape, trained=True)
    fake_update = rolled(nfe) * student + trained + regularised * teacher
    return recipe.fake_updates * fake_update + trained + 2 * teacher + student


def rolled(nfe: float) -> float:
    """Mean evaluations of a sample on the way to its own step of a trajectory of `nfe`, which is any of them alike."""
    return (nfe + 1) / 2


def evaluation_flops(pipeline: Any, role: Role, recipe: TdmRecipe, shape: tuple[int, ...], trained: bool) -> int:
    """FLOPs of one evaluation of a role, with its backward pass where `trained`; a multiplication and an addition are two."""
    text = backbone_of(pipeline).blank_text(pipeline, 1, recipe.text_length)
    x_t, t, nfe = (torch.zeros(size, device="meta") for size in (shape, (1,), (1,)))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
        x0, _ = role(x_t, t, text, nfe.long())
        if trained:
            x0.sum().backward()
    total: int = counter.get_total_flops()
    return total


def report(recipe: TdmRecipe, cost: Cost, gpu: Gpu, processes: int) -> str:
    """The configuration and the cost, for people."""
    lines = [f"{name} = {value!r}" for name, value in asdict(recipe).items()]
    head = ("", "parameters", "trained", "weights", "gradients", "optimiser", "EMA", "total")
    lines += ["", "{:<12}{:>12}{:>12}{:>10}{:>11}{:>11}{:>10}{:>10}".format(*head)]
    for role in cost.roles:
        sizes = (role.weights, role.gradients, role.optimiser, role.ema, role.total)
        gib = "{:>8.2f} G{:>9.2f} G{:>9.2f} G{:>8.2f} G{:>8.2f} G".format(*(size / 2**30 for size in sizes))
        lines.append(f"{role.role:<12}{role.parameters / 1e6:>10.1f} M{role.trained / 1e6:>10.1f} M{gib}")
    total = sum(role.total for role in cost.roles) / 2**30
    lines += [
        f"memory for these, on each GPU: {total:.2f} GiB; activations, autoencoder and text come on top",
        f"per iteration and sample: {cost.forwards:.4g} forwards, {cost.backwards} backwards",
        f"per iteration: {cost.samples} samples, {cost.flops / 1e12:.4g} TFLOP",
        f"{cost.iterations} iterations on one {gpu} at {UTILISATION:.0%} (assumed) of its {TFLOPS[gpu]:g} dense bf16 TFLOP/s: "
        f"{cost.hours(gpu):.3g} hours" + (f", {cost.hours(gpu) / processes:.3g} on {processes}" if processes > 1 else ""),
    ]
    return "\n".join(lines)

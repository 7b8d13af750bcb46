"""Stages of a student in half precision: what may be asked, the student with its stages cast, and a stage that overflows."""

import copy
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import nn

from export.graphs import Graph
from server.engine.student import GRAPHS, STAGES, GraphName, Precision
from tdm_train.backbones import backbone_of
from tdm_train.checkpoint import Student, denoiser_of

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALL_FP32: dict[GraphName, Precision] = dict.fromkeys(STAGES, "fp32")


def parse_precisions(told: str) -> dict[GraphName, Precision]:
    """One word for every stage ("fp16"), or "denoiser=fp16,vae=fp32", where a stage that is not named stays fp32.

    Raises ValueError for an unknown stage or precision, and for a stage that is named twice.
    """
    pairs = [part.strip().partition("=") for part in told.split(",")]
    if len(pairs) == 1 and not pairs[0][1]:
        return dict.fromkeys(STAGES, known_precision(pairs[0][0]))
    found: dict[GraphName, Precision] = {}
    for stage, _, precision in pairs:
        graphs = [graph for graph, its in STAGES.items() if its == stage]
        if not graphs:
            raise ValueError(f"precision of stage {stage!r}, legal stages: {', '.join(dict.fromkeys(STAGES.values()))}")
        if graphs[0] in found:
            raise ValueError(f"precision of stage {stage!r} is given twice, legal is once")
        found |= dict.fromkeys(graphs, known_precision(precision))
    return ALL_FP32 | found


def known_precision(word: str) -> Precision:
    """The precision that a word names; raises ValueError."""
    for precision in PRECISIONS:
        if word == precision:
            return precision
    raise ValueError(f"precision {word!r}, legal: {', '.join(PRECISIONS)}, or e.g. denoiser=fp16,vae=fp32")


def refuse_half_vae(vae: Any, precision: Precision) -> None:
    """Raises ValueError for float16 where the autoencoder says of itself that it overflows there."""
    if precision == "fp16" and vae.config.get("force_upcast"):
        raise ValueError(
            "vae=fp16 is refused: the autoencoder's config has force_upcast=true, its decoder overflows in float16; take "
            "vae=fp32 or vae=bf16, or an autoencoder that was mended for float16 and says force_upcast=false"
        )


def in_precision(student: Student, vae: Any, precisions: Mapping[GraphName, Precision]) -> tuple[Student, Any]:
    """The student, and the autoencoder that decodes for it, with every stage's weights in its precision.

    Stages that have it already are shared with the given ones, others are copies: the given student stays as it is.
    """
    text, denoiser, decoder = (DTYPES[precisions[graph]] for graph in GRAPHS)
    pipeline = copy.copy(student.pipeline)
    for name, part in student.pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            setattr(pipeline, name, in_dtype(part, text))
    network = backbone_of(pipeline).NETWORK
    setattr(pipeline, network, in_dtype(getattr(pipeline, network), denoiser))
    return Student(pipeline, denoiser_of(pipeline), student.description), in_dtype(vae, decoder)


def in_dtype(module: Any, dtype: torch.dtype) -> Any:
    """A copy of a module with weights of that dtype, but for those that its class keeps in float32; itself if it is one.

    The copy shares whatever needs no cast, so that no weight is ever there twice in the same precision.
    """
    if module.dtype == dtype:
        return module
    kept = kept_in_float32(module, dtype)

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        stays = not tensor.is_floating_point() or bool(kept & set(name.split(".")))
        return tensor.detach() if stays else tensor.detach().to(dtype)

    copied: dict[int, Any] = {id(buffer): cast(name, buffer) for name, buffer in module.named_buffers()}
    for name, parameter in module.named_parameters():
        copied[id(parameter)] = nn.Parameter(cast(name, parameter), requires_grad=False)
    return copy.deepcopy(module, copied)


def kept_in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of submodules that transformers and diffusers never cast (T5's "wo" overflows in float16)."""
    always, from_float16 = "_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"
    asked = {torch.float32: (), torch.float16: (always, from_float16), torch.bfloat16: (always,)}[dtype]
    return {name for part in module.modules() for attribute in asked for name in getattr(part, attribute, None) or ()}


def refuse_overflow(graph: Graph, stage: str, precision: Precision, latents: tuple[int, ...]) -> None:
    """Runs a half-precision module on its example; raises ValueError naming the first part of it that is not finite."""
    overflown: list[str] = []

    def watch(name: str) -> Any:
        def hook(part: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and not output.isfinite().all():
                overflown.append(name)

        return hook

    handles = [part.register_forward_hook(watch(name)) for name, part in graph.module.named_modules()]
    try:
        with torch.no_grad():
            graph.module(**graph.example(graph.batch(2), latents))
    finally:
        for handle in handles:
            handle.remove()
    if overflown:
        others = " or ".join(f"{stage}={other}" for other in PRECISIONS if other != precision and other != "fp16")
        raise ValueError(f"{stage}={precision} is refused: {overflown[0]} gives values that are not finite; take {others}")

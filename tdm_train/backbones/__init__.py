"""The backbones: one module per family, each with the same names.

FAMILY: its name in student.json. PIPELINES: its diffusers pipeline classes. NETWORK: the pipeline's component that denoises.
denoiser_of(pipeline) -> Denoiser. encode(pipeline, prompts, text_length) -> Text: what the pipeline itself makes of prompts
without guidance; blank_text(pipeline, count, text_length) -> Text: its shapes alone. latent_shape(pipeline, width, height,
frames) -> (C, h, w), of video (F, C, h, w).
"""

from types import ModuleType
from typing import Any

from tdm_train.backbones import cogvideox, pixart, sd3, sdxl, stable_diffusion

BACKBONES = (pixart, stable_diffusion, sdxl, sd3, cogvideox)


def backbone_of(pipeline: Any) -> ModuleType:
    """The backbone of an open diffusers pipeline; raises ValueError for a pipeline of any other class."""
    return backbone_named(type(pipeline).__name__)


def backbone_named(pipeline_class: str) -> ModuleType:
    """The backbone of a diffusers pipeline class, by the class's name as model_index.json has it."""
    legal = {pipeline.__name__: backbone for backbone in BACKBONES for pipeline in backbone.PIPELINES}
    if pipeline_class not in legal:
        raise ValueError(f"{pipeline_class} is not supported, legal pipeline classes: {', '.join(legal)}")
    return legal[pipeline_class]

"""A run's prompts, encoded, and what its samples are drawn of."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tdm_train.backbones import backbone_of
from tdm_train.backbones.sizes import own_size
from tdm_train.denoiser import Text
from tdm_train.prompts import encode_empty, encode_prompts, read_prompts
from tdm_train.run import Run
from tdm_train.samples import Judge, Samples
from tdm_train.scenes.captions import Claim
from tdm_train.scenes.evaluator import adherence, load_evaluator
from tdm_train.scenes.prompts import held_out_captions, scenes_prompts
from tdm_train.scenes_video import captions as clip_captions
from tdm_train.scenes_video.evaluator import load_evaluator as load_clip_evaluator
from tdm_train.scenes_video.world import FRAME_SIZE, FRAMES
from tdm_train.tdm_recipe import TdmRecipe
from tdm_train.text_cache import cached_prompts, free_text_encoders, text_parts


def prompts_of(recipe: TdmRecipe) -> list[str]:
    """The prompts of a recipe: captions of the scenes world, of clips for a recipe with frames, or those of a file."""
    if isinstance(recipe.prompts, int):
        return (clip_captions.video_prompts if recipe.frames else scenes_prompts)(recipe.prompts, recipe.seed)
    if not recipe.prompts:
        raise ValueError("prompts='', legal: a text file with one prompt per line, or a .jsonl file: --set prompts=FILE")
    return read_prompts(Path(recipe.prompts))


@dataclass(frozen=True)
class Texts:
    """Every prompt of the run, encoded, the empty one, once for each sample of a micro-batch, and what samples are drawn of."""

    prompts: Text
    empty: Text
    samples: Samples

    @staticmethod
    def of(pipeline: Any, prompts: list[str], recipe: TdmRecipe, run: Run) -> "Texts":
        """Encodes, or reads what is in the cache beside the run's folder; the pipeline's text encoders are freed."""
        for encoder in text_parts(pipeline).values():
            if isinstance(encoder, nn.Module):
                encoder.to(run.device)
        with run.accelerator.main_process_first(), torch.no_grad():
            texts = cached_prompts(pipeline, prompts, recipe.text_length, run.out.parent / "text_cache")
        empty = encode_empty(pipeline, recipe.text_length).to(run.device)
        samples = new_samples(pipeline, prompts, empty, recipe, run)
        free_text_encoders(pipeline)
        return Texts(texts, empty.select(torch.zeros(recipe.batch, dtype=torch.int64)), samples)


def new_samples(pipeline: Any, prompts: list[str], empty: Text, recipe: TdmRecipe, run: Run) -> Samples:
    """Held-out captions where the prompts are the scenes world's, else the first prompts, each with noise of its own."""
    size = recipe.sizes[-1] if recipe.sizes else own_size(pipeline)
    drawn, judge = what_to_draw(recipe, prompts, size)
    text = encode_prompts(pipeline, drawn, recipe.text_length).to(run.device)
    shape = latent_shape(recipe, pipeline, size)
    noise = torch.randn(len(drawn), *shape, generator=torch.Generator().manual_seed(recipe.seed)).to(run.device)
    return Samples(pipeline, noise, text, empty.select(torch.zeros(len(drawn), dtype=torch.int64)), judge)


def what_to_draw(recipe: TdmRecipe, prompts: list[str], size: str) -> tuple[list[str], Judge | None]:
    """Held-out captions and who judges what is drawn of them, where an evaluator reads this size; else the first prompts."""
    if isinstance(recipe.prompts, int) and (size, recipe.frames) == ("128x128", 0):
        scenes = held_out_captions(recipe.samples, recipe.seed)
        return [caption for _, caption, _ in scenes], partial(judge_pictures, [claim for *_, claim in scenes])
    if isinstance(recipe.prompts, int) and (size, recipe.frames) == (f"{FRAME_SIZE}x{FRAME_SIZE}", FRAMES):
        clips = clip_captions.held_out_captions(recipe.samples, recipe.seed)
        return [caption for _, caption, _ in clips], partial(judge_clips, [claim for *_, claim in clips])
    return prompts[: recipe.samples], None


def judge_pictures(claims: list[Claim], pictures: np.ndarray) -> float:
    return adherence(claims, load_evaluator().look(pictures)[1])[0]


def judge_clips(claims: list[clip_captions.Claim], clips: np.ndarray) -> float:
    return clip_captions.adherence(claims, load_clip_evaluator().look(clips)[1])[0]


def latent_shape(recipe: TdmRecipe, pipeline: Any, size: str) -> tuple[int, ...]:
    """The shape of the latents of a picture of this size, (C, h, w), or of a video, (F, C, h, w)."""
    width, height = map(int, size.split("x"))
    shape: tuple[int, ...] = backbone_of(pipeline).latent_shape(pipeline, width, height, recipe.frames or None)
    return shape

"""Prompts, encoded once: all that TDM trains on."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tdm_train.backbones import backbone_of
from tdm_train.denoiser import Text

CHUNK = 200


def read_prompts(file: Path) -> list[str]:
    """One prompt per line of a UTF-8 text file; blank lines are skipped."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: a prompt file has one prompt per line") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompts: one per line is needed")
    return prompts


def encode_prompts(pipeline: Any, prompts: list[str], length: int) -> Text:
    """Encodes prompts as the pipeline does, each padded to `length` tokens; raises ValueError for a longer one."""
    encode = backbone_of(pipeline).encode
    starts = tqdm(range(0, len(prompts), CHUNK), desc="encoding prompts", disable=len(prompts) < 2000, dynamic_ncols=True)
    return Text.concatenate(*(encode(pipeline, prompts[start : start + CHUNK], length) for start in starts))


def encode_empty(pipeline: Any, length: int) -> Text:
    """What the pipeline guides away from when it is given no negative prompt: the empty prompt, or zeros (SDXL)."""
    empty = encode_prompts(pipeline, [""], length)
    if not pipeline.config.get("force_zeros_for_empty_prompt", False):
        return empty
    assert empty.pooled is not None
    return Text(torch.zeros_like(empty.emb), pooled=torch.zeros_like(empty.pooled))

"""Prompts, encoded once: all that TDM trains on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tdm_train.backbones import backbone_of
from tdm_train.denoiser import Text

CHUNK = 200


def read_prompts(file: Path) -> list[str]:
    """The prompts of a UTF-8 file: one per line, or in a .jsonl file one object per line with the prompt in "prompt".

    Blank lines are skipped. Raises ValueError for what is no text, no such object, or holds no prompts.
    """
    try:
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text: a prompt file has one prompt per line") from None
    filled = ((number, line.strip()) for number, line in lines if line.strip())
    prompts = list(_json_prompts(file, filled) if file.suffix == ".jsonl" else (line for _, line in filled))
    if not prompts:
        raise ValueError(f"{file} holds no prompts: one per line is needed")
    if any("\0" in prompt for prompt in prompts):
        raise ValueError(f"{file} is not text: it has zero bytes")
    return prompts


def _json_prompts(file: Path, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for number, line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        prompt = found.get("prompt") if isinstance(found, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{file}, line {number}: {line[:60]!r}, legal: an object such as {{"prompt": "a red star"}}')
        yield prompt.strip()


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

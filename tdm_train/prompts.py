"""Prompts, encoded once: all that TDM trains on."""

from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from tdm_train.denoiser import Text


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


@torch.no_grad()
def encode_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase, text_encoder: T5EncoderModel, length: int) -> Text:
    """Encodes prompts, each padded to `length` tokens: emb float32 [N, length, D], mask int64 [N, length]."""
    embeddings, masks = [], []
    for start in tqdm(range(0, len(prompts), 200), desc="encoding prompts", disable=len(prompts) < 2000, dynamic_ncols=True):
        batch = tokenizer(prompts[start : start + 200], padding="max_length", max_length=length, return_tensors="pt")
        if batch.input_ids.shape[1] > length:
            longest = max(prompts[start : start + 200], key=len)
            raise ValueError(f"a prompt has {batch.input_ids.shape[1]} tokens, at most {length} are legal: {longest!r}")
        embeddings.append(text_encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state)
        masks.append(batch.attention_mask)
    return Text(torch.cat(embeddings), torch.cat(masks))

"""Text embeddings on disk, so that a run's prompts are encoded once, and text encoders that give their memory back."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tdm_train.denoiser import Text
from tdm_train.durable import write_whole
from tdm_train.prompts import encode_prompts


def cached_prompts(pipeline: Any, prompts: list[str], length: int, folder: Path) -> Text:
    """What encode_prompts makes of `prompts`, float32, read from `folder` where it has been made before.

    The file is named after the prompts, the tokenizers, the weights of the text encoders and `length`: whatever is changed is
    encoded anew. Its pages are read when their rows are selected.
    """
    file = folder / f"{text_digest(pipeline, prompts, length)}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        text = encode_prompts(pipeline, prompts, length)
        parts = {name: part.contiguous() for name, part in vars(text).items() if part is not None}
        write_whole(file, lambda fresh: save_file(parts, fresh))
    return Text(**load_file(file))


def text_digest(pipeline: Any, prompts: list[str], length: int) -> str:
    """SHA-256 over all that embeddings are a function of: the prompts, the text encoders with their tokenizers, the length."""
    digest = hashlib.sha256(f"{length}\0".encode() + "\0".join(prompts).encode())
    for name, part in sorted(text_parts(pipeline).items()):
        digest.update(name.encode())
        if isinstance(part, nn.Module):
            for key, tensor in part.state_dict().items():
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(part.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def text_parts(pipeline: Any) -> dict[str, Any]:
    """The pipeline's text encoders and tokenizers, by name."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if name.startswith(("text_encoder", "tokenizer")) and part is not None}


def free_text_encoders(pipeline: Any) -> None:
    """Takes the text encoders out of the pipeline: they are larger than most networks, and training needs them no more."""
    for name, part in text_parts(pipeline).items():
        if isinstance(part, nn.Module):
            setattr(pipeline, name, None)

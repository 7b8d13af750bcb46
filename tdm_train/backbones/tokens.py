"""Prompts that a tokenizer would cut."""

from typing import Any


def refuse_long_prompts(prompts: list[str], tokenizer: Any, length: int) -> None:
    """Raises ValueError for a prompt of more than `length` tokens, the end token counted: diffusers would cut it off."""
    for prompt, tokens in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
        if len(tokens) > length:
            raise ValueError(f"a prompt has {len(tokens)} tokens, at most {length} are legal: {prompt[:80]!r}")


def refuse_text_length(text_length: int, legal: int) -> None:
    """Raises ValueError for a text length that a network was not made for."""
    if text_length != legal:
        raise ValueError(f"text_length={text_length}, legal: {legal}, which this backbone was trained with")

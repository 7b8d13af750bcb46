"""Every text encoder gets its own tokens, padded as it was trained, and a prompt is read to its end or refused."""

from typing import Any

import numpy as np
import pytest

from server.engine.errors import InvalidRequest
from server.engine.session import Tensors
from server.engine.student import TokenizerSettings
from server.engine.text import TextEncoder, token_ids
from tests.tiny_student import VOCABULARY, tokenizer

END = VOCABULARY.index("</s>")


def settings(number: str = "", **changes: Any) -> TokenizerSettings:
    told = {"file": f"tokenizer{number}.json", "length": 6, "pad": 0, "masked": False, "truncates": False}
    return TokenizerSettings.model_validate(told | changes)


class Listening:
    """A text encoder of two outputs that keeps what it was given."""

    batch_invariant = True

    def __init__(self) -> None:
        self.told: list[Tensors] = []

    def run(self, tensors: Tensors) -> list[Any]:
        self.told.append(tensors)
        return [np.zeros((1, 6, 4), np.float32), np.ones((1, 8), np.float32)]


def test_two_tokenisers_pad_each_in_its_own_way_and_only_the_masked_one_sends_a_mask() -> None:
    session = Listening()
    tokenizers = [(settings(), tokenizer()), (settings("_2", pad=END, length=5, masked=True), tokenizer())]
    text = TextEncoder(tokenizers, session, ["text_emb", "pooled"]).encode("a red")
    (told,) = session.told
    assert set(told) == {"tokens", "tokens_2", "mask_2"}
    words = [VOCABULARY.index("a"), VOCABULARY.index("red"), END]
    assert told["tokens"].tolist() == [[*words, 0, 0, 0]]
    assert told["tokens_2"].tolist() == [[*words, END, END]]
    assert told["mask_2"].tolist() == [[1, 1, 1, 0, 0]]
    assert {name: array.shape for name, array in text.conditions.items()} == {"text_emb": (1, 6, 4), "pooled": (1, 8)}
    assert text.tokens == 3


def test_equal_prompts_are_encoded_once() -> None:
    session = Listening()
    encoder = TextEncoder([(settings(), tokenizer())], session, ["text_emb", "pooled"])
    assert encoder.encode("a red") is encoder.encode("a red")
    assert len(session.told) == 1


def test_a_prompt_that_is_too_long_is_refused_unless_the_encoder_reads_only_its_beginning() -> None:
    prompt = "a red circle above a blue square"
    with pytest.raises(InvalidRequest, match="8 tokens, at most 6"):
        token_ids(prompt, settings(), tokenizer())
    cut = token_ids(prompt, settings(truncates=True), tokenizer())
    assert cut == [*tokenizer().encode(prompt).ids[:5], END]

"""Prompt files, and embeddings that are made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5EncoderModel

from tdm_train.checkpoint import open_pipeline
from tdm_train.prompts import encode_prompts, read_prompts
from tdm_train.text_cache import cached_prompts, free_text_encoders, text_digest
from tests.miniatures import CLIP_LENGTH, PROMPTS, T5_LENGTH


def test_a_text_file_has_a_prompt_per_line_and_a_jsonl_file_an_object(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a red star\n\n  a ring \n")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a red star", "id": 1}\n\n{"prompt": " a ring "}\n')
    assert read_prompts(tmp_path / "lines.txt") == read_prompts(tmp_path / "lines.jsonl") == ["a red star", "a ring"]


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("empty.txt", b"\n", r"empty\.txt holds no prompts"),
        ("binary.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("zeros.txt", b"a\0b", "is not text: it has zero bytes"),
        ("empty.jsonl", b"", r"empty\.jsonl holds no prompts"),
        ("list.jsonl", b'{"prompt": "a"}\n["b"]\n', r"list\.jsonl, line 2: .*legal: an object such as"),
        ("other.jsonl", b'{"text": "a"}', r"other\.jsonl, line 1"),
        ("broken.jsonl", b'{"prompt": ', r"broken\.jsonl, line 1"),
        ("blank.jsonl", b'{"prompt": " "}', r"blank\.jsonl, line 1"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, contents: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name)


def parts(text: Any) -> list[torch.Tensor]:
    return [part for part in vars(text).values() if part is not None]


@pytest.mark.parametrize(("name", "length"), [("sdxl", CLIP_LENGTH), ("pixart_sigma", T5_LENGTH)])
def test_cached_embeddings_are_those_of_the_encoder_to_the_bit(
    name: str, length: int, tmp_path: Path, miniatures: Callable[[str], Path]
) -> None:
    pipeline = open_pipeline(miniatures(name))
    fresh = encode_prompts(pipeline, PROMPTS, length)
    first, second = (cached_prompts(pipeline, PROMPTS, length, tmp_path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 1
    for text in (first, second):
        assert all(torch.equal(one, other) for one, other in zip(parts(fresh), parts(text), strict=True))


def test_the_cache_is_read_and_not_made_again(tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(miniatures("pixart_sigma"))
    cached_prompts(pipeline, PROMPTS, T5_LENGTH, tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    cached_prompts(pipeline, PROMPTS, T5_LENGTH, tmp_path)
    assert file.stat().st_mtime_ns == before


def test_prompts_length_tokenizer_and_encoder_weights_all_name_the_file(miniatures: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(miniatures("pixart_sigma"))
    digests = [text_digest(pipeline, PROMPTS, 24), text_digest(pipeline, PROMPTS[:1], 24), text_digest(pipeline, PROMPTS, 25)]
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).view(-1)[0] += 1e-3
    digests.append(text_digest(pipeline, PROMPTS, 24))
    pipeline.tokenizer.add_tokens(["triangle"])
    digests.append(text_digest(pipeline, PROMPTS, 24))
    assert len(set(digests)) == len(digests)


def test_a_write_that_fails_leaves_nothing_in_the_cache(tmp_path: Path, miniatures: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(miniatures("pixart_sigma"))
    with pytest.raises(ValueError, match="tokens, at most 2 are legal"):
        cached_prompts(pipeline, PROMPTS, 2, tmp_path)
    assert not list(tmp_path.iterdir())


def test_text_encoders_are_freed_and_tokenizers_kept(miniatures: Callable[[str], Path]) -> None:
    pipeline = open_pipeline(miniatures("sd3"))
    assert isinstance(pipeline.text_encoder_3, T5EncoderModel)
    free_text_encoders(pipeline)
    assert [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3] == [None] * 3
    assert pipeline.tokenizer is not None

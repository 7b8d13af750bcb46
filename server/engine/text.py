"""Prompt -> what the student is told of it, once for equal prompts."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from server.engine.errors import InvalidRequest, StudentError
from server.engine.session import Session, Tensors
from server.engine.student import Condition, ExportedStudent, TokenizerSettings, token_tensors

CACHED_PROMPTS = 512  # of the bundled student: 6 MB


@dataclass(frozen=True)
class Text:
    """An encoded prompt. conditions: text_emb float32 [1, L, D], mask int64 [1, L] and pooled float32 [1, P], those of the
    student; tokens counts marks at the ends, not the padding."""

    conditions: Tensors
    tokens: int


class TextEncoder:
    """Tokenisers and text encoder behind a bounded cache of the prompts that were asked last. Threads may share it."""

    def __init__(
        self,
        tokenizers: Sequence[tuple[TokenizerSettings, Tokenizer]],
        session: Session,
        conditions: Sequence[Condition],
        capacity: int = CACHED_PROMPTS,
    ) -> None:
        self.tokenizers, self.session, self.conditions, self.capacity = tokenizers, session, conditions, capacity
        self.cache: OrderedDict[str, Text] = OrderedDict()
        self.lock = threading.Lock()  # held while encoding, so that equal prompts at once are encoded once

    @classmethod
    def of(cls, student: ExportedStudent, session: Session) -> "TextEncoder":
        """With the tokenisers of a verified student; raises StudentError."""
        return cls(open_tokenizers(student), session, student.manifest.conditions)

    def encode(self, prompt: str) -> Text:
        """Raises InvalidRequest."""
        with self.lock:
            if (known := self.cache.get(prompt)) is not None:
                self.cache.move_to_end(prompt)
                return known
            text = self.run(prompt)
            self.cache[prompt] = text
            if len(self.cache) > self.capacity:
                self.cache.popitem(last=False)
            return text

    def run(self, prompt: str) -> Text:
        """`encode` without the cache; arrays are read-only, since requests share them."""
        tensors, used = self.tokenise(prompt)
        outputs = self.session.run(tensors)
        encoded = dict(zip((name for name in self.conditions if name != "mask"), outputs, strict=True)) | tensors
        conditions: Tensors = {name: encoded[name] for name in self.conditions}
        for array in conditions.values():
            array.setflags(write=False)
        return Text(conditions, used)

    def tokenise(self, prompt: str) -> tuple[Tensors, int]:
        """prompt -> the text encoder's inputs, int64 [1, L] each, and tokens used. Raises InvalidRequest."""
        tensors: Tensors = {}
        used = 0
        for place, (settings, tokenizer) in enumerate(self.tokenizers):
            ids = token_ids(prompt, settings, tokenizer)
            padded = np.full((1, settings.length), settings.pad, np.int64)
            padded[0, : len(ids)] = ids
            mask = np.zeros((1, settings.length), np.int64)
            mask[0, : len(ids)] = 1
            tensors |= dict(zip(token_tensors(place, settings), (padded, mask), strict=False))
            used = max(used, len(ids))
        return tensors, used


def check_prompt(prompt: str, tokenizers: Sequence[tuple[TokenizerSettings, Tokenizer]]) -> None:
    """Raises InvalidRequest for what TextEncoder would refuse."""
    for settings, tokenizer in tokenizers:
        token_ids(prompt, settings, tokenizer)


def token_ids(prompt: str, settings: TokenizerSettings, tokenizer: Tokenizer) -> list[int]:
    """The prompt's tokens, at most settings.length. Raises InvalidRequest; truncates only where the settings say so."""
    try:
        ids: list[int] = tokenizer.encode(prompt).ids
    except TypeError:  # what the binding makes of a str that has no UTF-8
        raise InvalidRequest("prompt holds a lone surrogate; send valid Unicode", "prompt") from None
    if len(ids) <= settings.length:
        return ids
    if not settings.truncates:
        raise InvalidRequest(
            f"prompt has {len(ids)} tokens, at most {settings.length} are understood (end mark included)", "prompt"
        )
    return [*ids[: settings.length - 1], ids[-1]]  # the end mark stays


def open_tokenizers(student: ExportedStudent) -> list[tuple[TokenizerSettings, Tokenizer]]:
    """Those of a verified student; raises StudentError."""
    named = student.manifest.tokenizers
    return [(settings, open_tokenizer(settings.file, bytes(student.files[settings.file]))) for settings in named]


def open_tokenizer(file: str, contents: bytes) -> Tokenizer:
    """A tokenizer.json -> a tokeniser that neither pads nor truncates; raises StudentError."""
    try:
        tokenizer = Tokenizer.from_buffer(contents)
    except Exception as error:  # the binding raises bare Exception
        raise StudentError(f"{file} cannot be parsed: {error}; export the student again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

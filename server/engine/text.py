"""Prompt -> text embeddings, once for equal prompts."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from server.engine.errors import InvalidRequest, StudentError
from server.engine.session import Session

PAD = 0
CACHED_PROMPTS = 512  # of the bundled student: 6 MB


@dataclass(frozen=True)
class Text:
    """An encoded prompt: mask int64 [1, L], emb float [1, L, D]; tokens counts the end mark, not the padding."""

    mask: npt.NDArray[np.int64]
    emb: npt.NDArray[np.float32]
    tokens: int


class TextEncoder:
    """Tokeniser and text encoder behind a bounded cache of the prompts that were asked last. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, session: Session, length: int, capacity: int = CACHED_PROMPTS) -> None:
        self.tokenizer, self.session, self.length, self.capacity = tokenizer, session, length, capacity
        self.cache: OrderedDict[str, Text] = OrderedDict()
        self.lock = threading.Lock()  # held while encoding, so that equal prompts at once are encoded once

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
        tokens, mask, used = self.tokenise(prompt)
        (emb,) = self.session.run({"tokens": tokens, "mask": mask})
        emb.setflags(write=False)
        mask.setflags(write=False)
        return Text(mask, emb, used)

    def tokenise(self, prompt: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
        """prompt -> tokens [1, L] int64, mask [1, L] int64, tokens used. Raises InvalidRequest, never truncates."""
        try:
            ids = self.tokenizer.encode(prompt).ids
        except TypeError:  # what the binding makes of a str that has no UTF-8
            raise InvalidRequest("prompt holds a lone surrogate; send valid Unicode", "prompt") from None
        length = self.length
        if len(ids) > length:
            raise InvalidRequest(f"prompt has {len(ids)} tokens, at most {length} are understood (end mark included)", "prompt")
        tokens, mask = np.full((1, length), PAD, np.int64), np.zeros((1, length), np.int64)
        tokens[0, : len(ids)], mask[0, : len(ids)] = ids, 1
        return tokens, mask, len(ids)


def open_tokenizer(contents: bytes) -> Tokenizer:
    """tokenizer.json -> a tokenizer that neither pads nor truncates; raises StudentError."""
    try:
        tokenizer = Tokenizer.from_buffer(contents)
    except Exception as error:  # the binding raises bare Exception
        raise StudentError(f"tokenizer.json cannot be parsed: {error}; export the student again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

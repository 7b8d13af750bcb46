"""The text encoder of clips: a small T5 encoder trained to know what a caption states, and the tokenizer before it.

CogVideoX hands its transformer every token, padding included, and masks nothing; so texts have one length, and the encoder
is trained on them as diffusers' CogVideoXPipeline will feed it: padded, without a mask.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from tdm_train.recipes import MotionTextEncoderRecipe
from tdm_train.run import Run
from tdm_train.scenes.text_encoder import new_text_encoder, word_tokenizer
from tdm_train.scenes.world import Split
from tdm_train.scenes_video.captions import Claim, caption, vocabulary
from tdm_train.scenes_video.world import ATTRIBUTES, draw_clip

TEXT_LENGTH = 16
# What can be asked of a caption; an attribute that is left open answers None.
ANSWERS: dict[str, tuple[str | None, ...]] = {name: (None, *values) for name, values in ATTRIBUTES.items()}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Of the words of the captions of clips."""
    return word_tokenizer(vocabulary(), TEXT_LENGTH)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """int64 [B, 16]. Raises ValueError for a text that is longer than that."""
    tokens = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    if tokens.shape[1] > TEXT_LENGTH:
        raise ValueError(f"a caption has {tokens.shape[1]} tokens, at most {TEXT_LENGTH} are legal: {max(texts, key=len)!r}")
    return tokens


class ClaimReader(nn.Module):
    """Reads a caption's claim off the text encoder's output by one attention query per attribute, as the transformer's
    attention will; a module so that gradients synchronise between processes."""

    def __init__(self, text_encoder: T5EncoderModel):
        super().__init__()
        width = text_encoder.config.d_model
        self.text_encoder = text_encoder
        self.queries = nn.Parameter(0.1 * torch.randn(len(ANSWERS), width))
        self.keys, self.values, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ANSWERS.items()})

    def logits(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """tokens int64 [B, 16] -> float [B, answers] per attribute."""
        emb = self.text_encoder(tokens).last_hidden_state.float()
        scores = torch.einsum("qd,bld->bql", self.queries, self.keys(emb))
        found = self.norm(scores.softmax(-1) @ self.values(emb))
        return {name: self.heads[name](found[:, i]) for i, name in enumerate(ANSWERS)}

    def forward(self, tokens: torch.Tensor, answers: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum over the attributes of the mean cross entropy."""
        logits = self.logits(tokens)
        return torch.stack([F.cross_entropy(logits[name].float(), answers[name]) for name in ANSWERS]).sum()

    @torch.no_grad()
    def exact(self, tokens: torch.Tensor, answers: dict[str, torch.Tensor]) -> torch.Tensor:
        """Whether everything that each caption states was read right: bool [B]."""
        logits = self.logits(tokens)
        return torch.stack([logits[name].argmax(1) == answers[name] for name in ANSWERS]).all(0)


def answers_of(claims: list[Claim]) -> dict[str, torch.Tensor]:
    """The right answers: int64 [B] per attribute, 0 where it is left open."""
    return {name: torch.tensor([values.index(getattr(claim, name)) for claim in claims]) for name, values in ANSWERS.items()}


def draw_claims(
    tokenizer: PreTrainedTokenizerFast, seeds: range, split: Split = "train"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One caption per clip of `seeds`: tokens int64 [B, 16], and what was stated."""
    pairs = [caption(draw_clip(seed, split), np.random.Generator(np.random.Philox(key=[seed, 9]))) for seed in seeds]
    return tokenize(tokenizer, [text for text, _ in pairs]), answers_of([claim for _, claim in pairs])


def train_text_encoder(recipe: MotionTextEncoderRecipe, out: Path, resume: bool) -> None:
    """Trains on captions of the training split and saves `out/text_encoder` and `out/tokenizer`."""
    run = Run(out, recipe, resume)
    tokenizer = new_tokenizer()
    torch.manual_seed(recipe.seed)
    reader = ClaimReader(new_text_encoder(len(tokenizer)))
    loss_of, optimizer = run.prepare(reader, recipe.lr, recipe.warmup, recipe.ema, betas=(0.9, 0.99))
    for step in run.steps():
        first = 2 * 10**9 + (step * run.processes + run.rank) * recipe.batch
        tokens, answers = draw_claims(tokenizer, range(first, first + recipe.batch))
        loss = loss_of(tokens.to(run.device), {name: answer.to(run.device) for name, answer in answers.items()})
        run.update(loss, loss_of, optimizer)
        run.end_step(loss=float(loss.detach()))
    if run.rank == 0:
        average = run.averages[0][0].module.to("cpu")
        average.text_encoder.half().save_pretrained(out / "text_encoder")
        tokenizer.save_pretrained(out / "tokenizer")
        average.text_encoder.float()
        print(f"captions of held-out clips read exactly right: {exactness(average, tokenizer):.2%}")


def exactness(reader: ClaimReader, tokenizer: PreTrainedTokenizerFast, captions: int = 2000) -> float:
    """Share of captions of held-out clips all of whose statements are read right."""
    return float(reader.exact(*draw_claims(tokenizer, range(captions), "held_out")).float().mean())

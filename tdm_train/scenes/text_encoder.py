"""The scenes text encoder: a small T5 encoder trained to know what a caption states, and the tokenizer before it.

Image teachers stand on text encoders that already understand text. One trained from scratch along with the teacher never
learned which of two objects "above" belongs to: the image loss hardly rewards it (see tdm_train/LOG.md).
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tdm_train.recipes import TextEncoderRecipe
from tdm_train.run import Run
from tdm_train.scenes.captions import Claim, ItemClaim, caption, vocabulary
from tdm_train.scenes.world import BACKGROUNDS, LAYOUTS, OBJECT_COLOURS, SHAPES, SIZES, Split, draw_scene

TEXT_LENGTH = 32
# Where an object can be said to be; the last two hold a lone object, or a pair whose order the caption leaves open.
SLOTS = ("left", "right", "top", "bottom", "one", "other")
PAIR_SLOTS = {"side by side": ("left", "right"), "stacked": ("top", "bottom"), None: ("one", "other")}
PLACES = (*LAYOUTS[:9], "side by side", "stacked", None)
# Answers per slot and per caption; an attribute that is left open answers None, an empty slot "absent".
ITEM_ANSWERS: dict[str, tuple[str | None, ...]] = {
    "shape": ("absent", *SHAPES),
    "colour": ("absent", None, *OBJECT_COLOURS),
    "size": ("absent", None, *SIZES),
}
CAPTION_ANSWERS: dict[str, tuple[str | None, ...]] = {"place": PLACES, "background": (None, *BACKGROUNDS)}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Of the words of the world's captions."""
    return word_tokenizer(vocabulary(), TEXT_LENGTH)


def word_tokenizer(words: Iterable[str], length: int) -> PreTrainedTokenizerFast:
    """One token per word, lower-cased, closed by `</s>`; other words become `<unk>`. length: of the longest text, in tokens."""
    known = ("<pad>", "</s>", "<unk>", *words)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def new_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    """An untrained T5 encoder: 3 layers of width 96."""
    config = T5Config(
        vocab_size=vocabulary_size, d_model=96, d_kv=24, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0, pad_token_id=0
    )
    return T5EncoderModel(config)


class ClaimReader(nn.Module):
    """Reads a caption's claim off the text encoder's output by one attention query per slot and per question, as the
    transformer's cross-attention will; a module so that gradients synchronise between processes."""

    def __init__(self, text_encoder: T5EncoderModel):
        super().__init__()
        width = text_encoder.config.d_model
        self.text_encoder = text_encoder
        self.queries = nn.Parameter(0.1 * torch.randn(len(SLOTS) + len(CAPTION_ANSWERS), width))
        self.keys, self.values, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        answers = {**ITEM_ANSWERS, **CAPTION_ANSWERS}
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in answers.items()})

    def logits(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """tokens, mask int64 [B, L] -> float [B, slots, answers] per attribute of items, [B, answers] per other question."""
        emb = self.text_encoder(tokens, attention_mask=mask).last_hidden_state.float()
        scores = torch.einsum("qd,bld->bql", self.queries, self.keys(emb)).masked_fill(mask[:, None] == 0, -torch.inf)
        found = self.norm(scores.softmax(-1) @ self.values(emb))
        items = {name: self.heads[name](found[:, : len(SLOTS)]) for name in ITEM_ANSWERS}
        return items | {name: self.heads[name](found[:, len(SLOTS) + i]) for i, name in enumerate(CAPTION_ANSWERS)}

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, answers: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean over captions of the sum of cross entropies; a pair in open order counts in whichever order fits better."""
        logits = self.logits(tokens, mask)
        by_slot = [_item_loss(logits, {name: answers[name][:, order] for name in ITEM_ANSWERS}) for order in _slot_orders()]
        rest = sum(F.cross_entropy(logits[name].float(), answers[name]) for name in CAPTION_ANSWERS)
        return torch.stack(by_slot).min(0).values.mean() + rest

    @torch.no_grad()
    def exact(self, tokens: torch.Tensor, mask: torch.Tensor, answers: dict[str, torch.Tensor]) -> torch.Tensor:
        """Whether everything that each caption states was read right: bool [B]."""
        choice = {name: logits.argmax(-1) for name, logits in self.logits(tokens, mask).items()}
        orders = [
            torch.stack([(choice[name] == answers[name][:, order]).all(1) for name in ITEM_ANSWERS]).all(0)
            for order in _slot_orders()
        ]
        rest = torch.stack([choice[name] == answers[name] for name in CAPTION_ANSWERS]).all(0)
        return torch.stack(orders).any(0) & rest


def _slot_orders() -> tuple[list[int], list[int]]:
    plain = list(range(len(SLOTS)))
    return plain, [*plain[:-2], plain[-1], plain[-2]]


def _item_loss(logits: dict[str, torch.Tensor], answers: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = [F.cross_entropy(logits[name].float().transpose(1, 2), answers[name], reduction="none") for name in ITEM_ANSWERS]
    return torch.stack(losses).sum((0, 2))


def answers_of(claims: list[Claim]) -> dict[str, torch.Tensor]:
    """The right answers: int64 [B, slots] per attribute of items, [B] per other question."""
    answers = {name: torch.zeros(len(claims), len(SLOTS), dtype=torch.int64) for name in ITEM_ANSWERS}
    for row, claim in enumerate(claims):
        slots = PAIR_SLOTS[claim.place] if len(claim.items) == 2 else ("one",)
        for slot, item in zip(slots, claim.items, strict=True):
            for name in ITEM_ANSWERS:
                answers[name][row, SLOTS.index(slot)] = _answer(name, item)
    places = [PLACES.index(claim.place) for claim in claims]
    backgrounds = [CAPTION_ANSWERS["background"].index(claim.background) for claim in claims]
    return answers | {"place": torch.tensor(places), "background": torch.tensor(backgrounds)}


def _answer(name: str, item: ItemClaim) -> int:
    return ITEM_ANSWERS[name].index(getattr(item, name))


def draw_claims(
    tokenizer: PreTrainedTokenizerFast, seeds: range, split: Split = "train"
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """One caption per scene of `seeds`: tokens and mask int64 [B, L], and what was stated."""
    pairs = [caption(draw_scene(seed, split), np.random.Generator(np.random.Philox(key=[seed, 9]))) for seed in seeds]
    encoded = tokenizer([text for text, _ in pairs], padding=True, pad_to_multiple_of=4, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask, answers_of([claim for _, claim in pairs])


def train_text_encoder(recipe: TextEncoderRecipe, out: Path, resume: bool) -> None:
    """Trains on captions of the training split and saves `out/text_encoder` and `out/tokenizer`."""
    run = Run(out, recipe, resume)
    tokenizer = new_tokenizer()
    torch.manual_seed(recipe.seed)
    reader = ClaimReader(new_text_encoder(len(tokenizer)))
    loss_of, optimizer = run.prepare(reader, recipe.lr, recipe.warmup, recipe.ema, betas=(0.9, 0.99))
    for step in run.steps():
        first = 2 * 10**9 + (step * run.processes + run.rank) * recipe.batch
        tokens, mask, answers = draw_claims(tokenizer, range(first, first + recipe.batch))
        answers = {name: answer.to(run.device) for name, answer in answers.items()}
        loss = loss_of(tokens.to(run.device), mask.to(run.device), answers)
        run.update(loss, loss_of, optimizer)
        run.end_step(loss=float(loss.detach()))
    if run.rank == 0:
        average = run.averages[0][0].module.to("cpu")
        average.text_encoder.half().save_pretrained(out / "text_encoder")
        tokenizer.save_pretrained(out / "tokenizer")
        average.text_encoder.float()
        print(f"captions of held-out scenes read exactly right: {exactness(average, tokenizer):.2%}")


def exactness(reader: ClaimReader, tokenizer: PreTrainedTokenizerFast, captions: int = 2000) -> float:
    """Share of captions of held-out scenes all of whose statements are read right."""
    return float(reader.exact(*draw_claims(tokenizer, range(captions), "held_out")).float().mean())

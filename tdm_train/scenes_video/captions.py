"""Captions of clips: what a clip is said to show, in several wordings, with things left open at random.

A caption comes with its claim: the attributes that it states. A clip is right when everything claimed is true of it;
what the caption leaves open may be anything.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from tdm_train.scenes.captions import SHAPE_WORDS
from tdm_train.scenes.world import COLOURS
from tdm_train.scenes_video.world import ATTRIBUTES, Clip, draw_clip

# How often a caption leaves each attribute open; a motion that is left open leaves its speed open too.
OPEN = {"shape": 0.0, "colour": 0.2, "size": 0.4, "background": 0.35, "motion": 0.15, "speed": 0.4}

SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("medium",), "large": ("large", "big")}
MOTION_PHRASES = {
    "left": ("moves left", "moves to the left"),
    "right": ("moves right", "moves to the right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "falls"),
    "upper left": ("moves to the upper left", "moves to the top left"),
    "upper right": ("moves to the upper right", "moves to the top right"),
    "lower left": ("moves to the lower left", "moves to the bottom left"),
    "lower right": ("moves to the lower right", "moves to the bottom right"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "turn": ("turns", "spins"),
    "rest": ("stands still", "rests", "does not move"),
}
SPEED_WORDS = {"slow": ("slowly",), "fast": ("quickly", "fast")}
BACKGROUND_PHRASES = (" on a {} background", " on {}", ", {} background", " against a {} background")
TRAIN_PROMPTS, EVALUATION_PROMPTS = 3 * 10**9, 5 * 10**9  # first clip seed of each, apart from all seeds that are rendered


@dataclass(frozen=True)
class Claim:
    """What a caption says of a clip, or what a network reads in one; None leaves it open (the speed of a clip at rest)."""

    shape: str
    colour: str | None
    size: str | None
    background: str | None
    motion: str | None
    speed: str | None

    def judge(self, seen: "Claim") -> dict[str, bool]:
        """Which of the stated attributes are true of what is seen: a dict over those that are stated."""
        return {name: value == getattr(seen, name) for name, value in asdict(self).items() if value is not None}


def truth(clip: Clip) -> Claim:
    """The claim that leaves nothing open."""
    return Claim(**{name: getattr(clip, name) for name in ATTRIBUTES})


def caption(clip: Clip, rng: np.random.Generator) -> tuple[str, Claim]:
    """Words for a clip, and what they state: wording and what is left open are drawn from `rng`."""
    stated = {name: getattr(clip, name) if rng.random() >= OPEN[name] else None for name in ATTRIBUTES}
    if stated["motion"] is None:
        stated["speed"] = None
    claim = Claim(**stated)
    text = " ".join(("a", *_object_words(claim, rng), *_motion_words(claim, rng)))
    if claim.background:
        text += _pick(BACKGROUND_PHRASES, rng).format(claim.background)
    return text.replace("a orange", "an orange"), claim


def _object_words(claim: Claim, rng: np.random.Generator) -> list[str]:
    size = _pick(SIZE_WORDS[claim.size], rng) if claim.size else None
    return [word for word in (size, claim.colour, _pick(SHAPE_WORDS[claim.shape], rng)) if word]


def _motion_words(claim: Claim, rng: np.random.Generator) -> list[str]:
    if claim.motion is None:
        return []
    phrase = _pick(MOTION_PHRASES[claim.motion], rng)
    if claim.speed is None:
        return [phrase]
    speed = _pick(SPEED_WORDS[claim.speed], rng)
    return [phrase, speed] if speed == "fast" or rng.random() < 0.5 else [speed, phrase]


def _pick(wordings: tuple[str, ...], rng: np.random.Generator) -> str:
    return wordings[rng.integers(len(wordings))]


def vocabulary() -> tuple[str, ...]:
    """Every word that captions of clips use, in a fixed order."""
    groups = [*SIZE_WORDS.values(), *SHAPE_WORDS.values(), *MOTION_PHRASES.values(), *SPEED_WORDS.values()]
    text = " ".join(phrase for group in groups for phrase in group) + " " + " ".join(BACKGROUND_PHRASES).replace("{}", "")
    return tuple(dict.fromkeys(("a", "an", *COLOURS, *text.replace(",", " , ").split())))


def video_prompts(count: int, seed: int) -> list[str]:
    """`count` captions of training clips; no clip is ever rendered for them."""
    first = TRAIN_PROMPTS + seed * 10**6
    return [caption(draw_clip(s), np.random.Generator(np.random.Philox(s)))[0] for s in range(first, first + count)]


def held_out_captions(count: int, seed: int) -> list[tuple[Clip, str, Claim]]:
    """`count` held-out clips with a caption each and what it states. The clip is one of those it allows."""
    first = EVALUATION_PROMPTS + seed * 10**6
    clips = [draw_clip(s, "held_out") for s in range(first, first + count)]
    return [(clip, *caption(clip, np.random.Generator(np.random.Philox(first + i)))) for i, clip in enumerate(clips)]


def adherence(claims: Iterable[Claim], readings: Iterable[Claim]) -> tuple[float, dict[str, float]]:
    """Share of clips all of whose stated attributes are right, and the share right per attribute where stated."""
    verdicts = [claim.judge(seen) for claim, seen in zip(claims, readings, strict=True)]
    kinds = [kind for kind in ATTRIBUTES if any(kind in verdict for verdict in verdicts)]
    by_kind = {kind: float(np.mean([verdict[kind] for verdict in verdicts if kind in verdict])) for kind in kinds}
    return float(np.mean([all(verdict.values()) for verdict in verdicts])), by_kind

"""Captions: what a scene is said to hold, in several wordings, with things left open at random.

A caption comes with its claim: the attributes that it states. A picture is right when everything claimed is true of it;
what the caption leaves open may be anything.
"""

from dataclasses import dataclass

import numpy as np

from tdm_train.scenes.world import COLOURS, LAYOUTS, Item, Scene

# How often a caption leaves each attribute open.
OPEN = {"size": 0.4, "colour": 0.2, "background": 0.35, "place": 0.35}

SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}
SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus"),
    "ring": ("ring", "ring", "hoop"),
}
PLACE_PHRASES = {
    "top left": ("in the top left", "in the upper left corner"),
    "top middle": ("at the top", "in the top middle"),
    "top right": ("in the top right", "in the upper right corner"),
    "middle left": ("on the left", "at the left"),
    "middle middle": ("in the middle", "in the centre", "in the center"),
    "middle right": ("on the right", "at the right"),
    "bottom left": ("in the bottom left", "in the lower left corner"),
    "bottom middle": ("at the bottom", "in the bottom middle"),
    "bottom right": ("in the bottom right", "in the lower right corner"),
}
# (the first named comes first in the scene, axis) -> wordings
RELATION_PHRASES = {
    (True, "side by side"): ("left of", "to the left of"),
    (False, "side by side"): ("right of", "to the right of"),
    (True, "stacked"): ("above", "over"),
    (False, "stacked"): ("below", "under"),
}
BACKGROUND_PHRASES = (" on a {} background", " on {}", ", {} background", " against a {} background")


@dataclass(frozen=True)
class ItemClaim:
    """What a caption says of one object; None leaves it open."""

    shape: str
    colour: str | None
    size: str | None


@dataclass(frozen=True)
class Claim:
    """What a caption states. `place` is one of LAYOUTS' nine places (one object) or "side by side" / "stacked" (a pair,
    whose items then stand in scene order: left before right, top before bottom); None leaves it open."""

    items: tuple[ItemClaim, ...]
    place: str | None
    background: str | None


def caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Claim]:
    """Words for a scene, and what they state: wording and what is left open are drawn from `rng`."""
    claims = tuple(_claim_item(item, rng) for item in scene.items)
    phrases = [_item_phrase(claim, rng) for claim in claims]
    placed, has_background = rng.random() >= OPEN["place"], rng.random() >= OPEN["background"]
    if len(claims) == 1:
        place = scene.layout if placed else None
        text = phrases[0] + (" " + _pick(PLACE_PHRASES[scene.layout], rng) if placed else "")
    else:
        place = scene.layout.split(",")[0] if placed else None
        text = _pair_text(phrases, place, rng)
    background = scene.background if has_background else None
    if background:
        text += _pick(BACKGROUND_PHRASES, rng).format(background)
    return text.replace("a orange", "an orange"), Claim(claims, place, background)


def _claim_item(item: Item, rng: np.random.Generator) -> ItemClaim:
    colour = item.colour if rng.random() >= OPEN["colour"] else None
    return ItemClaim(item.shape, colour, item.size if rng.random() >= OPEN["size"] else None)


def _item_phrase(claim: ItemClaim, rng: np.random.Generator) -> str:
    size = _pick(SIZE_WORDS[claim.size], rng) if claim.size else None
    words = ("a", size, claim.colour, _pick(SHAPE_WORDS[claim.shape], rng))
    return " ".join(word for word in words if word)


def _pair_text(phrases: list[str], place: str | None, rng: np.random.Generator) -> str:
    in_order = bool(rng.random() < 0.5)
    first, second = phrases if in_order else phrases[::-1]
    joint = _pick(RELATION_PHRASES[in_order, place], rng) if place else "and"
    return f"{first} {joint} {second}"


def _pick(wordings: tuple[str, ...], rng: np.random.Generator) -> str:
    return wordings[rng.integers(len(wordings))]


def vocabulary() -> tuple[str, ...]:
    """Every word that captions use, in a fixed order."""
    phrases = [*SIZE_WORDS.values(), *SHAPE_WORDS.values(), *PLACE_PHRASES.values(), *RELATION_PHRASES.values()]
    text = " ".join(word for group in phrases for word in group) + " " + " ".join(BACKGROUND_PHRASES).replace("{}", "")
    words = dict.fromkeys(text.replace(",", " , ").replace("-", " - ").split())
    return tuple(dict.fromkeys(("a", "an", "and", *COLOURS, *words)))


def check_layout(place: str | None, layout: str) -> bool:
    """Whether a claimed place agrees with a layout (one of LAYOUTS) that was read from a picture."""
    assert layout in LAYOUTS
    return place is None or layout == place or layout.startswith(place + ",")

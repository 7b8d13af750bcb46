"""Prompts of the scenes world: captions without their pictures."""

import numpy as np

from tdm_train.scenes.captions import Claim, caption
from tdm_train.scenes.world import Scene, draw_scene

TRAIN_PROMPTS, EVALUATION_PROMPTS = 3 * 10**9, 5 * 10**9  # first scene seed of each, apart from all seeds that are rendered


def scenes_prompts(count: int, seed: int) -> list[str]:
    """`count` captions of training scenes; no scene is ever rendered for them."""
    first = TRAIN_PROMPTS + seed * 10**6
    return [caption(draw_scene(s), np.random.Generator(np.random.Philox(s)))[0] for s in range(first, first + count)]


def held_out_captions(count: int, seed: int) -> list[tuple[Scene, str, Claim]]:
    """`count` held-out scenes with a caption each and what it states. The scene is one of the pictures it allows."""
    first = EVALUATION_PROMPTS + seed * 10**6
    scenes = [draw_scene(s, "held_out") for s in range(first, first + count)]
    return [(scene, *caption(scene, np.random.Generator(np.random.Philox(first + i)))) for i, scene in enumerate(scenes)]

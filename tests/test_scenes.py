"""The scenes world: deterministic, fair to its held-out combinations, and readable by its evaluator."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_train.scenes.captions import PLACE_PHRASES, Claim, ItemClaim, caption
from tdm_train.scenes.evaluator import Reading, adherence, frechet_distance, judge, load_evaluator
from tdm_train.scenes.prompts import held_out_captions, scenes_prompts
from tdm_train.scenes.text_encoder import (
    SLOTS,
    TEXT_LENGTH,
    ClaimReader,
    answers_of,
    draw_claims,
    new_text_encoder,
    new_tokenizer,
)
from tdm_train.scenes.world import COLOURS, LAYOUTS, Item, Scene, draw_scene, is_held_out, render, render_batch

seeds = st.integers(0, 2**62)


def claim_of(scene: Scene) -> Claim:
    """The claim that leaves nothing open."""
    items = tuple(ItemClaim(item.shape, item.colour, item.size) for item in scene.items)
    return Claim(items, scene.layout if len(items) == 1 else scene.layout.split(",")[0], scene.background)


def reading_of(scene: Scene) -> Reading:
    return Reading(claim_of(scene).items, scene.layout, scene.background)


@given(seeds)
def test_the_same_seed_draws_and_renders_the_same_picture(seed: int) -> None:
    assert draw_scene(seed) == draw_scene(seed)
    assert np.array_equal(render(draw_scene(seed)), render(draw_scene(seed)))


@given(seeds)
def test_training_scenes_hold_no_held_out_combination_and_held_out_scenes_do(seed: int) -> None:
    def held_out(scene: Scene) -> bool:
        return any(is_held_out(item.shape, item.colour, item.size, scene.background) for item in scene.items)

    assert not held_out(draw_scene(seed))
    assert held_out(draw_scene(seed, "held_out"))


@given(seeds)
def test_objects_differ_from_the_background_and_do_not_overlap(seed: int) -> None:
    scene = draw_scene(seed)
    assert all(item.colour != scene.background for item in scene.items)
    if len(scene.items) == 2:
        first, second = scene.items
        assert np.hypot(first.x - second.x, first.y - second.y) > first.radius + second.radius


def test_edges_are_antialiased() -> None:
    scene = Scene((Item("circle", "white", "large", 0.5, 0.5, 0.18),), "middle middle", "black")
    values = np.unique(render(scene)[:, :, 0])
    assert {COLOURS["black"][0], COLOURS["white"][0]} <= set(values)
    assert len(values) > 10


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'blob' is not one of circle, square"):
        render(Scene((Item("blob", "red", "small", 0.5, 0.5, 0.1),), "middle middle", "white"))


@given(seeds, seeds)
def test_what_a_caption_states_is_true_of_its_scene(seed: int, wording: int) -> None:
    scene = draw_scene(seed)
    text, claim = caption(scene, np.random.default_rng(wording))
    assert all(judge(claim, reading_of(scene)).values())
    assert claim.background is None or claim.background in text


@given(seeds)
def test_every_caption_fits_the_tokenizer_without_unknown_words(seed: int) -> None:
    ids = TOKENIZER(caption(draw_scene(seed), np.random.default_rng(seed))[0])["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert len(ids) <= TEXT_LENGTH
    assert ids[-1] == TOKENIZER.eos_token_id


TOKENIZER = new_tokenizer()


def test_captions_leave_every_kind_of_attribute_open_at_times() -> None:
    claims = [claim for _, _, claim in held_out_captions(300, seed=1)]
    assert any(claim.place is None for claim in claims)
    assert any(claim.background is None for claim in claims)
    assert any(item.colour is None for claim in claims for item in claim.items)
    assert any(item.size is None for claim in claims for item in claim.items)


def test_training_prompts_are_decided_by_the_seed_and_evaluation_captions_are_of_held_out_scenes() -> None:
    assert scenes_prompts(5, seed=0) == scenes_prompts(5, seed=0)
    assert scenes_prompts(5, seed=0) != scenes_prompts(5, seed=1)
    for scene, _, _ in held_out_captions(50, seed=0):
        assert any(is_held_out(item.shape, item.colour, item.size, scene.background) for item in scene.items)


def test_the_evaluator_reads_at_least_98_percent_of_held_out_renders_exactly() -> None:
    scenes = [draw_scene(seed, "held_out") for seed in range(4 * 10**9, 4 * 10**9 + 400)]
    _, readings = load_evaluator().look(render_batch(scenes))
    assert np.mean([reading == reading_of(scene) for reading, scene in zip(readings, scenes, strict=True)]) >= 0.98


def test_a_wrong_colour_a_swapped_pair_and_a_missing_object_are_each_seen() -> None:
    red, blue = ItemClaim("circle", "red", None), ItemClaim("square", "blue", None)
    seen = Reading((ItemClaim("circle", "red", "small"), ItemClaim("square", "blue", "large")), LAYOUTS[9], "white")
    assert all(judge(Claim((red, blue), "side by side", None), seen).values())
    assert not judge(Claim((blue, red), "side by side", None), seen)["shape"]
    assert all(judge(Claim((blue, red), None, None), seen).values()), "without a stated order either order is right"
    assert judge(Claim((red, blue), None, "black"), seen) == {"count": True, "shape": True, "colour": True, "background": False}
    assert not judge(Claim((red,), None, None), seen)["count"]


def test_adherence_counts_pictures_all_of_whose_stated_attributes_are_right() -> None:
    scenes = [draw_scene(seed) for seed in range(10)]
    readings = [reading_of(scene) for scene in scenes]
    assert adherence([claim_of(scene) for scene in scenes], readings)[0] == 1
    assert adherence([claim_of(scene) for scene in scenes], readings[1:] + readings[:1])[0] < 1


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form() -> None:
    features = np.random.default_rng(0).normal(size=(20_000, 3))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, 2 * features + 3) == pytest.approx(3 * 9 + 3, rel=0.03)


def test_places_are_named_for_every_single_layout() -> None:
    assert tuple(PLACE_PHRASES) == LAYOUTS[:9]


def test_a_relation_decides_the_slots_of_a_claim_and_an_open_order_decides_none() -> None:
    red, blue = ItemClaim("circle", "red", None), ItemClaim("square", "blue", "small")
    left, right, top, bottom, one, _ = range(len(SLOTS))
    shapes = answers_of([Claim((red, blue), "side by side", None), Claim((red, blue), "stacked", None)])["shape"]
    assert shapes[0, left] == shapes[1, top] != shapes[0, right] == shapes[1, bottom]
    lone = answers_of([Claim((red,), "top left", "white")])
    assert (lone["shape"][0] > 0).nonzero().flatten().tolist() == [one]
    reader = ClaimReader(new_text_encoder(len(TOKENIZER)))
    encoded = TOKENIZER(["a red circle and a small blue square"], return_tensors="pt")
    pair, swapped = (answers_of([Claim(items, None, None)]) for items in ((red, blue), (blue, red)))
    losses = [reader(encoded.input_ids, encoded.attention_mask, answers) for answers in (pair, swapped)]
    assert torch.allclose(*losses), "without a stated order either order is right"
    assert pair["shape"][0, one] != swapped["shape"][0, one]


@pytest.mark.slow
def test_a_text_encoder_learns_to_tell_which_object_of_a_pair_is_which() -> None:
    torch.manual_seed(0)
    reader = ClaimReader(new_text_encoder(len(TOKENIZER)))
    tokens, mask, answers = draw_claims(TOKENIZER, range(24))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        reader(tokens, mask, answers).backward()
        optimizer.step()
    assert reader.exact(tokens, mask, answers).float().mean() >= 0.9
    wrong = {**answers, "shape": answers["shape"].roll(1, 0)}
    assert reader.exact(tokens, mask, wrong).float().mean() <= 0.2

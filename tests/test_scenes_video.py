"""The scenes world in motion: deterministic, fair to its held-out combinations, and readable by its evaluator."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, CogVideoXPipeline, DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.evaluate_video import VideoEvaluation, VideoTeacher
from benchmarks.evaluation import student_rows
from export.video_decoders import VideoDecoder
from tdm_train.checkpoint import load_student, open_pipeline
from tdm_train.recipes import RECIPES
from tdm_train.scenes.evaluator import frechet_distance
from tdm_train.scenes.text_encoder import new_text_encoder
from tdm_train.scenes.world import COLOURS
from tdm_train.scenes_video.autoencoder import draw_blocks, new_autoencoder, to_blocks, to_clips
from tdm_train.scenes_video.captions import Claim, adherence, caption, held_out_captions, truth, video_prompts
from tdm_train.scenes_video.evaluator import blemish, load_evaluator
from tdm_train.scenes_video.inflate import inflate
from tdm_train.scenes_video.teacher import (
    TeacherLoss,
    latent_shape,
    new_transformer,
    save_teacher,
    teacher_sampler,
)
from tdm_train.scenes_video.text_encoder import ClaimReader, answers_of, draw_claims, new_tokenizer, tokenize
from tdm_train.scenes_video.world import (
    DIRECTIONS,
    FPS,
    FRAME_SIZE,
    FRAMES,
    MOTIONS,
    ROUND,
    Clip,
    draw_clip,
    is_held_out,
    render_clip,
    render_clips,
)
from tdm_train.schedule import NoiseSchedule
from tdm_train.trainer import train_tdm
from tests.conftest import ROOT

seeds = st.integers(0, 2**62)
TOKENIZER = new_tokenizer()
BLUE_STAR = Clip("star", "blue", "medium", "white", "turn", "slow", 0.5, 0.5, 0.16, turned=1.0)


def centre_and_area(frames: np.ndarray, background: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the object in each frame: its centre (x, y) in pixels [F, 2], and its area in pixels [F]."""
    mask = (frames != np.uint8(COLOURS[background])).any(-1)
    y, x = np.mgrid[:FRAME_SIZE, :FRAME_SIZE]
    return np.stack([[x[frame].mean(), y[frame].mean()] for frame in mask]), mask.sum((1, 2))


@settings(max_examples=20)
@given(seeds)
def test_the_same_seed_draws_and_renders_the_same_clip(seed: int) -> None:
    assert draw_clip(seed) == draw_clip(seed)
    assert np.array_equal(render_clip(draw_clip(seed)), render_clip(draw_clip(seed)))


@given(seeds)
def test_training_clips_are_of_no_held_out_combination_and_held_out_clips_are(seed: int) -> None:
    for split in ("train", "held_out"):
        clip = draw_clip(seed, split)
        assert is_held_out(clip.shape, clip.colour, clip.background, clip.motion) == (split == "held_out")


@settings(max_examples=60)
@given(seeds)
def test_the_frames_show_the_motion_that_the_clip_states(seed: int) -> None:
    clip = draw_clip(seed)
    frames = render_clip(clip)
    centre, area = centre_and_area(frames, clip.background)
    shift = centre[-1] - centre[0]
    if clip.motion == "turn":
        assert np.abs(shift).max() < clip.radius * FRAME_SIZE, "a triangle's weight is not where it turns about"
    else:
        way = np.trunc(shift / 6).clip(-1, 1)  # triangles and stars that grow shift their weight a little
        assert tuple(way) == DIRECTIONS.get(clip.motion, (0, 0))
    growth = area[-1] / area[0]
    assert (growth > 1.4, growth < 0.7) == (clip.motion == "grow", clip.motion == "shrink")
    assert np.array_equal(frames[0], frames[-1]) == (clip.motion == "rest")


@given(seeds)
def test_a_fast_clip_goes_further_than_any_slow_one_and_stays_in_the_frame(seed: int) -> None:
    clip = draw_clip(seed)
    if clip.motion in DIRECTIONS:
        assert (np.hypot(clip.dx, clip.dy) > 0.3) == (clip.speed == "fast")
    for x, y, radius in ((clip.x, clip.y, clip.radius), (clip.x + clip.dx, clip.y + clip.dy, clip.radius * clip.growth)):
        assert min(x, y) - radius >= 0
        assert max(x, y) + radius <= 1


@given(seeds)
def test_only_shapes_that_show_it_turn_and_only_clips_at_rest_have_no_speed(seed: int) -> None:
    clip = draw_clip(seed)
    assert clip.motion != "turn" or clip.shape not in ROUND
    assert (clip.speed is None) == (clip.motion == "rest")
    assert clip.colour != clip.background


def test_turning_is_clockwise_and_leaves_the_centre_where_it_is() -> None:
    upright, turned = render_clip(BLUE_STAR)[0], render_clip(replace(BLUE_STAR, turned=2 * np.pi / 5))[-1]
    assert np.abs(upright.astype(int) - turned).max() <= 1, "a star has five points"
    eighth = render_clip(replace(BLUE_STAR, turned=2 * np.pi / 20))[-1].astype(int)
    assert (np.abs(eighth - upright) > 100).sum() > 50
    tip = np.argwhere(eighth[:, :, 0] < 120)[0]
    assert tip[1] > FRAME_SIZE / 2, "the topmost point has gone to the right"


@given(seeds, seeds)
def test_what_a_caption_states_is_true_of_its_clip(seed: int, wording: int) -> None:
    clip = draw_clip(seed)
    text, claim = caption(clip, np.random.default_rng(wording))
    assert all(claim.judge(truth(clip)).values())
    assert all(value is None or value in text for value in (claim.colour, claim.background))
    assert claim.speed is None or any(word in text for word in ("slowly", "quickly", "fast"))


@given(seeds)
def test_every_caption_fits_the_tokenizer_without_unknown_words(seed: int) -> None:
    tokens = tokenize(TOKENIZER, [caption(draw_clip(seed), np.random.default_rng(seed))[0]])
    assert TOKENIZER.unk_token_id not in tokens
    assert (tokens == TOKENIZER.eos_token_id).sum() == 1


def test_a_caption_that_is_too_long_is_refused_with_its_length() -> None:
    with pytest.raises(ValueError, match="has 31 tokens, at most 16 are legal: 'a red"):
        tokenize(TOKENIZER, ["a red " * 15])


def test_captions_leave_everything_but_the_shape_open_at_times() -> None:
    claims = [claim for _, _, claim in held_out_captions(200, seed=1)]
    for name in ("colour", "size", "background", "motion", "speed"):
        assert 0.1 < np.mean([getattr(claim, name) is None for claim in claims]) < 0.7
    assert all(claim.shape for claim in claims)


def test_training_prompts_are_decided_by_the_seed_and_evaluation_captions_are_of_held_out_clips() -> None:
    assert video_prompts(5, seed=0) == video_prompts(5, seed=0) != video_prompts(5, seed=1)
    for clip, _, _ in held_out_captions(50, seed=0):
        assert is_held_out(clip.shape, clip.colour, clip.background, clip.motion)


def test_a_wrong_motion_is_seen_and_an_open_one_is_not_asked_for() -> None:
    said = Claim("star", "blue", None, None, "left", None)
    seen = Claim("star", "blue", "small", "white", "right", "slow")
    assert said.judge(seen) == {"shape": True, "colour": True, "motion": False}
    assert adherence([said, replace(said, motion=None)], [seen, seen]) == (0.5, {"shape": 1, "colour": 1, "motion": 0})


def test_the_evaluator_reads_every_attribute_of_98_percent_of_held_out_renders() -> None:
    clips = [draw_clip(seed, "held_out") for seed in range(4 * 10**9, 4 * 10**9 + 200)]
    _, readings = load_evaluator().look(render_clips(clips))
    share, by_kind = adherence([truth(clip) for clip in clips], readings)
    assert min(by_kind.values()) >= 0.98
    assert share >= 0.96


def test_clips_of_one_motion_are_far_from_clips_of_another_in_the_frechet_distance() -> None:
    clips = [draw_clip(seed) for seed in range(400)]
    features, _ = load_evaluator().look(render_clips(clips))
    moving = np.array([clip.motion in DIRECTIONS for clip in clips])
    mixed = np.arange(len(clips)) % 2 == 0
    apart = frechet_distance(features[moving], features[~moving])
    assert apart > 2 * frechet_distance(features[mixed], features[~mixed])


def test_blocks_hold_every_pixel() -> None:
    clips = torch.from_numpy(render_clips([draw_clip(0), draw_clip(1)]))
    assert torch.equal(to_clips(to_blocks(clips)), clips)


def test_objects_weigh_more_than_the_background() -> None:
    blocks, weight = draw_blocks(range(2), object_weight=4.0)
    assert blocks.shape == weight.shape
    assert weight.unique().tolist() == [1.0, 5.0]


def test_an_inflated_autoencoder_begins_with_what_the_image_autoencoder_knows() -> None:
    torch.manual_seed(0)
    blank, inflated = new_autoencoder().eval(), new_autoencoder().eval()
    image_vae = AutoencoderKL.from_pretrained(ROOT / "tdm_train/scenes/teacher/vae", dtype=torch.float32).eval()
    inflate(image_vae, inflated)
    blocks = to_blocks(torch.from_numpy(render_clips([BLUE_STAR])))
    with torch.no_grad():
        by_frame = image_vae.decode(image_vae.encode(blocks[0].transpose(0, 1)).latent_dist.mean).sample.transpose(0, 1)
        errors = [
            (vae.decode(vae.encode(blocks).latent_dist.mean).sample - by_frame).square().mean() for vae in (blank, inflated)
        ]
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 20


def test_a_blemished_clip_is_still_read() -> None:
    clips = [draw_clip(seed) for seed in range(20)]
    pixels = blemish(torch.from_numpy(render_clips(clips)), torch.Generator().manual_seed(0))
    _, readings = load_evaluator().look(pixels.numpy())
    assert adherence([truth(clip) for clip in clips], readings)[0] >= 0.9


def test_an_open_attribute_is_an_answer_of_its_own() -> None:
    answers = answers_of([Claim("circle", None, None, None, MOTIONS[0], "slow"), Claim("ring", "red", None, None, None, None)])
    assert answers["colour"].tolist() == [0, 1]
    assert answers["motion"].tolist() == [1, 0]


def test_a_saved_teacher_opens_in_diffusers_and_computes_the_same_with_plain_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sampler = teacher_sampler(1.5)
    assert sampler.alphas_cumprod[-1] == 0, "the last timestep is pure noise"
    save_teacher(new_transformer(), new_text_encoder(len(TOKENIZER)), new_autoencoder(), TOKENIZER, sampler, tmp_path)
    stock, ours = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32), open_pipeline(tmp_path)
    assert isinstance(stock, CogVideoXPipeline)
    call = {"num_frames": FRAMES, "height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 16}
    latents = torch.randn(1, *latent_shape(stock.transformer))
    made = [pipe("a red ring rises", latents=latents, output_type="latent", **call).frames for pipe in (stock, ours)]
    torch.testing.assert_close(*made)
    with torch.no_grad():
        assert to_clips(stock.vae.decode(made[0].transpose(1, 2)).sample).shape == (1, FRAMES, FRAME_SIZE, FRAME_SIZE, 3)


def test_the_exported_decoder_puts_pixel_blocks_together_as_the_autoencoder_is_read() -> None:
    torch.manual_seed(0)
    vae, latents = new_autoencoder().eval(), torch.randn(2, *latent_shape(new_transformer()))
    with torch.no_grad():
        expected = to_clips(vae.decode(latents.transpose(1, 2) / vae.config.scaling_factor).sample)
        assert torch.equal(VideoDecoder(vae)(latents), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("full_precision")  # ten times as fast on a processor without AVX-512
def test_a_teacher_of_clips_becomes_a_student_that_its_evaluator_watches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    save_teacher(
        new_transformer(), new_text_encoder(len(TOKENIZER)), new_autoencoder(), TOKENIZER, teacher_sampler(1.5), teacher
    )
    recipe = replace(
        RECIPES["motion_tdm"], teacher=str(teacher), precision="no", iterations=1, batch=2, prompts=8, samples=4, sample_every=1
    )
    train_tdm(recipe, tmp_path, resume=False)
    with Image.open(tmp_path / "samples" / "000001_k4.png") as sheet:
        assert sheet.size == (4 * FRAME_SIZE, FRAME_SIZE), "the frame in the middle of each clip"
    student = load_student(tmp_path / "student")
    assert (student.description.frames, student.description.fps, student.nfe_set) == (FRAMES, FPS, (1, 2, 3, 4))
    evaluation = VideoEvaluation(2, seed=0, reference=range(4))
    rows = student_rows(tmp_path / "student", [1, 4], evaluation, lambda folder: VideoTeacher(folder, evaluation))
    assert [row.pictures.shape for row in rows] == [(2, FRAMES, FRAME_SIZE, FRAME_SIZE, 3)] * 2
    assert not np.array_equal(rows[0].pictures, rows[1].pictures)


@pytest.mark.slow
def test_the_teacher_learns_to_predict_v_from_one_clip() -> None:
    torch.manual_seed(0)
    transformer = new_transformer()
    loss_of = TeacherLoss(transformer, NoiseSchedule("v_prediction", teacher_sampler(1.5).alphas_cumprod.float()))
    x0, text_emb = torch.randn(1, *latent_shape(transformer)).expand(8, -1, -1, -1, -1), torch.randn(8, 16, 96)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = loss_of(x0, text_emb, torch.randint(1, 1000, (8,)), torch.randn_like(x0))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.6 * losses[0]


@pytest.mark.slow
def test_a_text_encoder_learns_what_captions_state() -> None:
    torch.manual_seed(0)
    reader = ClaimReader(new_text_encoder(len(TOKENIZER)))
    tokens, answers = draw_claims(TOKENIZER, range(24))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        reader(tokens, answers).backward()
        optimizer.step()
    assert reader.exact(tokens, answers).float().mean() >= 0.9
    wrong = {**answers, "motion": answers["motion"].roll(1)}
    assert reader.exact(tokens, wrong).float().mean() <= 0.3


@pytest.mark.slow
def test_the_recipes_build_on_one_another_up_to_a_teacher_that_makes_clips(tmp_path: Path) -> None:
    vae, text = tmp_path / "vae", tmp_path / "text"
    replace(RECIPES["motion_vae"], iterations=1, batch=1, image_vae=str(ROOT / "tdm_train/scenes/teacher/vae")).train(
        vae, False
    )
    replace(RECIPES["motion_text_encoder"], iterations=1, batch=4).train(text, False)
    teacher = replace(
        RECIPES["motion_teacher"],
        vae=str(vae / "vae"),
        text_encoder=str(text / "text_encoder"),
        clips=4,
        iterations=2,
        batch=4,
    )
    teacher.train(tmp_path / "teacher", False)
    row = VideoTeacher(tmp_path / "teacher/teacher", VideoEvaluation(2, seed=0, reference=range(150))).row(steps=2, guidance=3)
    assert row.nfe == 4
    assert row.pictures.shape == (2, FRAMES, FRAME_SIZE, FRAME_SIZE, 3)

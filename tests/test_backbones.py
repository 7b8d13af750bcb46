"""Every backbone is, evaluation by evaluation, what its own diffusers pipeline is; and K-conditioning works on each."""

import copy
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

from export.sampler_table import sampler_table
from tdm_train.backbones import BACKBONES, backbone_of, cogvideox, sdxl
from tdm_train.checkpoint import denoiser_of, open_pipeline
from tdm_train.denoiser import Denoiser, Text
from tdm_train.prompts import encode_empty, encode_prompts
from tdm_train.steps_aware import fold, make_steps_aware, timestep_embedding, unfold
from tests.miniatures import CLIP_LENGTH, FRAMES, HEIGHT, MINIATURES, PROMPTS, T5_LENGTH, WIDTH, save_miniature

every_backbone = pytest.mark.parametrize("opened", MINIATURES, indirect=True)


class Opened(NamedTuple):
    pipeline: Any
    backbone: ModuleType
    denoiser: Denoiser
    text: Text

    @property
    def frames(self) -> int | None:
        return FRAMES if self.backbone.FAMILY == "cogvideox" else None

    @property
    def text_length(self) -> int:
        return CLIP_LENGTH if self.backbone.FAMILY in ("stable_diffusion", "sdxl") else T5_LENGTH

    def noise(self) -> torch.Tensor:
        shape = self.backbone.latent_shape(self.pipeline, WIDTH, HEIGHT, self.frames)
        return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(7))

    def diffusers_latents(self, noise: torch.Tensor, nfe: int) -> torch.Tensor:
        """What the pipeline itself makes of PROMPTS at guidance 1."""
        options: dict[str, Any] = {} if self.backbone.NETWORK == "unet" else {"max_sequence_length": self.text_length}
        if self.backbone.FAMILY == "pixart":
            options |= {"use_resolution_binning": False, "clean_caption": False}
        if self.frames:
            options["num_frames"] = self.frames
        size = {"width": WIDTH, "height": HEIGHT, "guidance_scale": 1.0, "num_inference_steps": nfe}
        made = self.pipeline(PROMPTS, latents=noise.clone(), output_type="latent", return_dict=False, **size, **options)
        return made[0]


def open_miniature(name: str, folder: Path) -> Opened:
    pipeline = open_pipeline(folder)
    backbone = backbone_of(pipeline)
    length = CLIP_LENGTH if backbone.FAMILY in ("stable_diffusion", "sdxl") else T5_LENGTH
    return Opened(pipeline, backbone, denoiser_of(pipeline), backbone.encode(pipeline, PROMPTS, length))


@pytest.fixture
def opened(request: pytest.FixtureRequest, miniatures: Any) -> Opened:
    """One backbone's miniature, freshly opened."""
    return open_miniature(request.param, miniatures(request.param))


@torch.no_grad()
def run_table(opened: Opened, noise: torch.Tensor, nfe: int) -> torch.Tensor:
    """The denoiser driven by the rows of the pipeline's scheduler."""
    latents, x0_prev = noise, torch.zeros_like(noise)
    for timestep, c0, c1, c2 in sampler_table(opened.pipeline.scheduler, nfe):
        x0, _ = opened.denoiser(latents, torch.full((len(noise),), timestep), opened.text)
        latents, x0_prev = c0 * latents + c1 * x0 + c2 * x0_prev, x0
    return latents


def assert_equal_at_unit_scale(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.std()))


@every_backbone
def test_denoiser_and_table_make_the_pipelines_own_latents(opened: Opened) -> None:
    noise = opened.noise()
    for nfe in (1, 2, 3, 4):
        assert_equal_at_unit_scale(run_table(opened, noise, nfe), opened.diffusers_latents(noise, nfe))


def test_a_network_evaluated_at_timestep_0_is_read_by_the_noise_that_is_left_there(miniatures: Any) -> None:
    opened = open_miniature("stable_diffusion", miniatures("stable_diffusion"))
    opened.pipeline.scheduler = DDIMScheduler.from_config(opened.pipeline.scheduler.config, steps_offset=0)
    assert sampler_table(opened.pipeline.scheduler, 4)[-1][0] == 0
    assert_equal_at_unit_scale(run_table(opened, opened.noise(), 4), opened.diffusers_latents(opened.noise(), 4))


@every_backbone
def test_text_timestep_and_pooled_text_all_reach_the_network(opened: Opened) -> None:
    one, t = opened.noise()[:1].repeat_interleave(2, 0), torch.full((2,), 500.0)
    first, second = torch.tensor([0, 0]), torch.tensor([0, 1])
    emb, pooled = opened.text.emb, opened.text.pooled
    words = opened.text.select(first)
    with torch.no_grad():
        at_500 = opened.denoiser.predict(one, t, words)
        other_text = opened.denoiser.predict(one, t, Text(emb[second], words.mask, words.pooled))
        other_time = opened.denoiser.predict(one, t / 5, words)
    torch.testing.assert_close(at_500[0], at_500[1])
    assert float((other_text[0] - other_text[1]).abs().mean()) > 1e-3
    assert float((at_500 - other_time).abs().mean()) > 1e-3
    if pooled is not None:
        other_pooled = opened.denoiser.predict(one, t, Text(words.emb, words.mask, pooled[second]))
        assert float((other_pooled[0] - other_pooled[1]).detach().abs().mean()) > 1e-3


@every_backbone
def test_prompts_longer_than_the_text_length_are_refused(opened: Opened) -> None:
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, at most (24|77) are legal: 'a a a"):
        opened.backbone.encode(opened.pipeline, ["a red circle", "a " * 600], opened.text_length)


@pytest.mark.parametrize("opened", ["stable_diffusion", "sdxl", "cogvideox_2b"], indirect=True)
def test_a_text_length_that_the_network_was_not_made_for_is_refused(opened: Opened) -> None:
    with pytest.raises(ValueError, match=f"text_length=20, legal: {opened.text_length}"):
        opened.backbone.encode(opened.pipeline, PROMPTS, 20)


def test_prompts_encoded_together_are_the_prompts_encoded_alone(miniatures: Any) -> None:
    opened = open_miniature("pixart_sigma", miniatures("pixart_sigma"))
    many = encode_prompts(opened.pipeline, PROMPTS * 101, T5_LENGTH)  # in two chunks
    assert many.emb.shape[0] == 202
    for part, alone in ((many.select(slice(200, 202)), opened.text), (many.select(torch.tensor([0, 201])), opened.text)):
        torch.testing.assert_close(part.emb, alone.emb)
        assert torch.equal(part.mask, alone.mask)


@pytest.mark.parametrize("opened", ["sdxl", "sd3"], indirect=True)
def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(opened: Opened) -> None:
    empty = encode_empty(opened.pipeline, opened.text_length)
    arguments = (["a"], None) if opened.backbone is sdxl else (["a"], None, None)
    options = {} if opened.backbone is sdxl else {"max_sequence_length": opened.text_length}
    with torch.no_grad():
        _, negative, _, negative_pooled = opened.pipeline.encode_prompt(*arguments, do_classifier_free_guidance=True, **options)
    torch.testing.assert_close(empty.emb, negative)
    torch.testing.assert_close(empty.pooled, negative_pooled)


@every_backbone
def test_k_conditioning_starts_as_an_exact_no_op_and_is_learned(opened: Opened) -> None:
    plain, t = opened.denoiser, torch.full((2,), 500.0)
    aware = copy.deepcopy(plain)
    make_steps_aware(aware.network, (1, 2, 3, 4))
    noise, nfe = opened.noise(), torch.tensor([3, 1])
    assert torch.equal(plain(noise, t, opened.text)[0], aware(noise, t, opened.text, nfe)[0])
    aware(noise, t, opened.text, nfe)[0].square().mean().backward()
    vectors = dict(aware.named_parameters())[f"network.{timestep_embedding(aware.network)[0]}.k_embedding"]
    assert [bool(row.any()) for row in vectors.grad] == [False, True, False, True, False]


@every_backbone
def test_a_folded_network_is_the_steps_aware_one_at_that_k_and_unfolds_again(opened: Opened) -> None:
    denoiser, noise, t = opened.denoiser, opened.noise(), torch.full((2,), 500.0)
    plain_names = set(denoiser.network.state_dict())
    make_steps_aware(denoiser.network, (1, 4))
    torch.nn.init.normal_(timestep_embedding(denoiser.network)[1].k_embedding)
    with torch.no_grad():
        at = {nfe: denoiser(noise, t, opened.text, torch.full((2,), nfe))[0] for nfe in (1, 4)}
        mixed = denoiser(noise, t, opened.text, torch.tensor([1, 4]))[0]
        assert float((at[1] - at[4]).abs().mean()) > 1e-3
        torch.testing.assert_close(mixed, torch.stack([at[1][0], at[4][1]]), rtol=1e-4, atol=1e-5)
        vectors = fold(denoiser.network, 4)
        assert set(denoiser.network.state_dict()) == plain_names
        torch.testing.assert_close(denoiser(noise, t, opened.text)[0], at[4], rtol=1e-4, atol=1e-5)
        unfold(denoiser.network, vectors, 4)
        torch.testing.assert_close(denoiser(noise, t, opened.text, torch.ones(2).long())[0], at[1], rtol=1e-4, atol=1e-5)


@every_backbone
def test_k_conditioning_survives_gradient_checkpointing(opened: Opened) -> None:
    denoiser, noise, t, nfe = opened.denoiser.train(), opened.noise(), torch.full((2,), 500.0), torch.tensor([1, 2])
    make_steps_aware(denoiser.network, (1, 2))
    k_embedding = timestep_embedding(denoiser.network)[1].k_embedding
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            denoiser.network.enable_gradient_checkpointing()
        k_embedding.grad = None
        denoiser(noise, t, opened.text, nfe)[0].square().mean().backward()
        gradients.append(k_embedding.grad)
    torch.testing.assert_close(*gradients)


@every_backbone
def test_a_steps_aware_network_that_is_not_told_nfe_says_so(opened: Opened) -> None:
    make_steps_aware(opened.denoiser.network, (1, 2))
    with pytest.raises(ValueError, match=r"must be told nfe, int64 \[B\]"):
        opened.denoiser(opened.noise(), torch.full((2,), 500.0), opened.text)


@every_backbone
def test_a_steps_aware_denoiser_can_be_traced_with_a_free_batch(opened: Opened) -> None:
    make_steps_aware(opened.denoiser.network, (1, 2, 4))
    torch.nn.init.normal_(timestep_embedding(opened.denoiser.network)[1].k_embedding)
    parts = {name: value for name, value in vars(opened.text).items() if value is not None}

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = opened.denoiser

        def forward(
            self, x_t: torch.Tensor, t: torch.Tensor, nfe: torch.Tensor, parts: dict[str, torch.Tensor]
        ) -> torch.Tensor:
            for other in (t, nfe, *parts.values()):
                torch._check(other.shape[0] == x_t.shape[0])
            return self.denoiser(x_t, t, Text(**parts), nfe)[0]

    batch, noise = torch.export.Dim.AUTO, opened.noise()
    shapes = ({0: batch}, {0: batch}, {0: batch}, {name: {0: batch} for name in parts})
    inputs = (noise, torch.tensor([999.0, 500.0]), torch.tensor([1, 4]), parts)
    with torch.no_grad():
        program = torch.export.export(Traced().eval(), inputs, dynamic_shapes=shapes, strict=False)
        rows = torch.tensor([1, 0, 1])
        three = (*(value[rows] for value in inputs[:3]), {name: value[rows] for name, value in parts.items()})
        torch.testing.assert_close(program.module()(*three), Traced()(*three), rtol=1e-4, atol=1e-5)


@every_backbone
def test_half_precision_needs_the_network_alone_halved(opened: Opened) -> None:
    noise, t = opened.noise(), torch.full((2,), 500.0)
    with torch.no_grad():
        full, _ = opened.denoiser(noise, t, opened.text)
        opened.denoiser.network.to(torch.bfloat16)
        half, eps = opened.denoiser(noise, t, opened.text)
    assert half.dtype == eps.dtype == torch.float32
    assert float((half - full).abs().mean()) < 0.05 * float(full.std())


def test_sdxl_reads_the_pictures_size_off_the_latents_when_traced(miniatures: Any) -> None:
    denoiser = open_miniature("sdxl", miniatures("sdxl")).denoiser

    class TimeIds(torch.nn.Module):
        def forward(self, x_t: torch.Tensor) -> torch.Tensor:
            return denoiser.time_ids(x_t)

    free = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    program = torch.export.export(TimeIds(), (torch.zeros(2, 4, 8, 12),), dynamic_shapes=(free,))
    ids = program.module()(torch.zeros(3, 4, 10, 6))
    assert ids.dtype == torch.float32
    assert ids.tolist() == [[40, 24, 0, 0, 40, 24]] * 3


def test_videos_of_another_size_get_the_pipelines_own_rotary_embedding(miniatures: Any) -> None:
    opened = open_miniature("cogvideox_5b", miniatures("cogvideox_5b"))
    for width, height, frames in ((WIDTH, HEIGHT, FRAMES), (32, 48, 17)):
        shape = opened.backbone.latent_shape(opened.pipeline, width, height, frames)
        theirs = opened.pipeline._prepare_rotary_positional_embeddings(height, width, shape[0], torch.device("cpu"))
        for ours, other in zip(opened.denoiser.rotary(torch.zeros(1, *shape)), theirs, strict=True):
            assert torch.equal(ours, other)
    assert not [name for name in opened.denoiser.state_dict() if "rotary" in name]


def test_cogvideox_15_is_refused(miniatures: Any) -> None:
    pipeline = open_pipeline(miniatures("cogvideox_5b"))
    pipeline.transformer.register_to_config(patch_size_t=2)
    with pytest.raises(ValueError, match=r"patch_size_t=2 \(CogVideoX 1.5\), legal: None"):
        cogvideox.denoiser_of(pipeline)


@every_backbone
def test_sizes_that_the_latents_cannot_have_are_refused(opened: Opened) -> None:
    multiple = {"unet": 4}.get(opened.backbone.NETWORK, 16 if opened.frames else 8)
    with pytest.raises(ValueError, match=f"size 50x32, legal: multiples of {multiple} pixels"):
        opened.backbone.latent_shape(opened.pipeline, 50, 32, opened.frames)
    with pytest.raises(ValueError, match="frames="):
        opened.backbone.latent_shape(opened.pipeline, WIDTH, HEIGHT, None if opened.frames else 9)


def test_a_pipeline_of_another_class_is_refused_before_its_weights_are_read(miniatures: Any, tmp_path: Path) -> None:
    pipeline = open_pipeline(miniatures("stable_diffusion"))
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(
        ValueError, match="StableDiffusionImg2ImgPipeline is not supported, legal pipeline classes: PixArtAlpha"
    ):
        backbone_of(other)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="FluxPipeline is not supported"):
        open_pipeline(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save_miniature("stable_diffusion", tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be opened as a diffusers pipeline"):
        open_pipeline(folder)


def test_every_backbone_has_a_miniature(miniatures: Any) -> None:
    assert {backbone_of(open_pipeline(miniatures(name))) for name in MINIATURES} == set(BACKBONES)

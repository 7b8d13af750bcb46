"""A video decoded chunk by chunk has the pixels of a decode in one piece, and what is held meanwhile does not grow with it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from export.student_graphs import chunk_graphs
from export.video_decoders import ChunkDecoder, VideoDecoder, chunks_of, in_frames
from server.engine.clip import Clip
from server.engine.engine import Engine
from server.engine.errors import NumericalError
from tests.miniatures import save_miniature
from tests.tiny_video import build_tiny_video


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderKLCogVideoX:
    folder = save_miniature("cogvideox_2b", tmp_path_factory.mktemp("miniature") / "pipeline")
    return AutoencoderKLCogVideoX.from_pretrained(folder / "vae").eval()


def latents_of(frames: int) -> torch.Tensor:
    return torch.randn(1, frames, 4, 4, 6, generator=torch.Generator().manual_seed(frames))


@torch.no_grad()
def by_chunks(vae: AutoencoderKLCogVideoX, latents: torch.Tensor) -> tuple[torch.Tensor, set[int]]:
    """The video uint8 [1, frames, H, W, 3], and how long the states between the chunks were."""
    first, *later = chunks_of(vae, latents.shape[1])
    begin = ChunkDecoder(vae)
    video, state = begin(latents[:, :first])
    following, videos, lengths, done = ChunkDecoder(vae, begin), [video], {state.shape[1]}, first
    for frames in later:
        video, state = following(latents[:, done : done + frames], state)
        videos.append(video)
        lengths.add(state.shape[1])
        done += frames
    return torch.cat(videos, dim=1), lengths


@pytest.mark.parametrize(("frames", "chunks"), [(1, [1]), (3, [3]), (4, [2, 2]), (13, [3, 2, 2, 2, 2, 2])])
def test_chunks_are_cut_where_diffusers_cuts(vae: AutoencoderKLCogVideoX, frames: int, chunks: list[int]) -> None:
    assert chunks_of(vae, frames) == chunks
    cut: list[int] = []
    handle = vae.decoder.register_forward_pre_hook(lambda module, inputs: cut.append(inputs[0].shape[2]))
    with torch.no_grad():
        vae.decode(torch.zeros(1, 4, frames, 2, 2))
    handle.remove()
    assert cut == chunks


@pytest.mark.parametrize("frames", [4, 5, 9])
def test_chunks_have_the_very_bits_of_a_decode_in_one_piece(vae: AutoencoderKLCogVideoX, frames: int) -> None:
    latents = latents_of(frames)
    whole = copy.copy(vae)
    whole._modules = vae._modules | {"decoder": in_frames(vae.decoder)}
    with torch.no_grad():
        expected = VideoDecoder(whole)(latents)
    video, _ = by_chunks(vae, latents)
    assert torch.equal(video, expected)


def test_a_video_of_one_chunk_has_one_decoder_and_hands_nothing_on(vae: AutoencoderKLCogVideoX) -> None:
    (graph,) = chunk_graphs(vae, (3, 4, 4, 6))
    assert (graph.name, graph.outputs) == ("vae_decoder", ("image",))
    latents = graph.example(1, (3, 4, 4, 6))["latents"]
    with torch.no_grad():
        different = graph.module(latents).int() - VideoDecoder(vae)(latents).int()
    assert different.abs().max() <= 1


def test_convolutions_of_frames_are_those_of_diffusers_within_rounding(vae: AutoencoderKLCogVideoX) -> None:
    latents = latents_of(5)
    with torch.no_grad():
        expected = VideoDecoder(vae)(latents)
    video, _ = by_chunks(vae, latents)
    different = (video.int() - expected.int()).abs()
    assert different.max() <= 1
    assert different.float().mean() < 1e-3, "a level either way is a rounding edge, and rare"


def test_what_is_held_between_chunks_does_not_grow_with_the_video(vae: AutoencoderKLCogVideoX) -> None:
    (_, short), (_, long) = by_chunks(vae, latents_of(5)), by_chunks(vae, latents_of(11))
    assert short == long
    assert len(long) == 1


def test_the_exported_student_decodes_as_diffusers_does(video_repository: Path) -> None:
    folder = video_repository.parent / "student" / "vae"
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, torch_dtype=torch.float32).eval()
    engine = Engine.open(video_repository / "cogvideox-2b")
    assert engine.manifest.chunks == [3, 2]
    latents = latents_of(5)
    with torch.no_grad():
        decoded = vae.decode(latents.transpose(1, 2) / vae.config.scaling_factor).sample
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 4, 1)[0].numpy()
    (video,) = engine.decode("48x32", [latents.numpy()])
    assert video.shape == (17, 32, 48, 3)
    different = np.abs(video - expected)
    assert different.max() <= 1
    assert different.mean() < 1e-3


@pytest.mark.parametrize("shape", [(1, 9, 32, 63, 3), (1, 25, 32, 64, 3), (1, 26, 32, 64, 3)])
def test_frames_of_another_shape_or_number_are_refused(shape: tuple[int, ...]) -> None:
    clip = Clip(np.zeros((1, 7, 4, 4, 8), np.float32), [3, 2, 2], (25, 32, 64, 3))
    with pytest.raises(NumericalError, match="after 0 frames"):
        clip.add(np.zeros(shape, np.uint8), None)


def test_a_video_that_ends_too_early_is_refused() -> None:
    clip = Clip(np.zeros((1, 5, 4, 4, 8), np.float32), [3, 2], (17, 32, 64, 3))
    clip.add(np.zeros((1, 9, 32, 64, 3), np.uint8), np.zeros((1, 1), np.float32))
    with pytest.raises(NumericalError, match="after 9 frames"):
        clip.add(np.zeros((1, 7, 32, 64, 3), np.uint8), None)


def test_chunks_and_state_go_from_graph_to_graph_in_order(tmp_path: Path) -> None:
    engine = Engine.open(build_tiny_video(tmp_path))
    latents = np.random.default_rng(0).standard_normal((1, 7, 4, 4, 8)).astype(np.float32)
    (video,) = engine.decode("64x32", [latents])
    changed = latents.copy()
    changed[:, 0] += 1
    (other,) = engine.decode("64x32", [changed])
    assert video.shape == (25, 32, 64, 3)
    assert not np.array_equal(video[-1], other[-1]), "the last chunk has heard of the first"
    changed = latents.copy()
    changed[:, -1] += 1
    (other,) = engine.decode("64x32", [changed])
    assert np.array_equal(video[:17], other[:17]), "what comes later changes nothing before it"

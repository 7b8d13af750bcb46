"""The plain attention computes what diffusers' own does."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

from tdm_train import plain_attention
from tdm_train.checkpoint import denoiser_of
from tdm_train.denoiser import Text
from tdm_train.plain_attention import JointAttention


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_5b"])  # without and with rotary embeddings
def test_joint_attention_is_that_of_diffusers(name: str, miniatures: Callable[[str], Path]) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(miniatures(name), dtype=torch.float32)
    transformer: CogVideoXTransformer3DModel = pipeline.transformer
    denoiser, config = denoiser_of(pipeline), transformer.config
    x_t = torch.randn(2, *denoiser.own_size[:1], config.in_channels, *denoiser.own_size[1:])
    text, t = Text(torch.randn(2, config.max_text_seq_length, config.text_embed_dim)), torch.tensor([20.0, 900.0])
    answers = []
    with torch.no_grad():
        for fused in (True, False):
            if not fused:
                plain_attention.plain_attention(pipeline)
            answers.append(denoiser(x_t, t, text)[0])
    assert all(isinstance(one, JointAttention) for one in transformer.attn_processors.values())
    torch.testing.assert_close(answers[0], answers[1])


def test_a_network_of_long_videos_keeps_fused_attention(
    miniatures: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(miniatures("cogvideox_2b"), dtype=torch.float32)
    monkeypatch.setattr(plain_attention, "MOST_TOKENS", plain_attention.video_tokens(pipeline.transformer.config) - 1)
    plain_attention.plain_attention(pipeline)
    assert not any(isinstance(one, JointAttention) for one in pipeline.transformer.attn_processors.values())


def test_the_tokens_of_cogvideox_2b_are_those_of_the_paper() -> None:
    config = {"sample_frames": 49, "temporal_compression_ratio": 4, "sample_height": 60, "sample_width": 90, "patch_size": 2}
    assert plain_attention.video_tokens(SimpleNamespace(**config)) == 13 * 30 * 45

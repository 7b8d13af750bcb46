"""K-conditioning: the number of evaluations a trajectory has is an input of the student and of the fake score.

One learned vector per K, zero at the start (so an exact no-op), is added to the network's timestep embedding. For one K
it can be folded into a bias, which turns the network back into a plain diffusers model of that K.
"""

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

MAX_NFE = 64


class StepsAwareEmbedding(nn.Module):
    """Takes the place of `adaln_single.emb`: the same timestep embedding plus `k_embedding[nfe]`.

    diffusers passes `added_cond_kwargs` through to this module, so `nfe` [B] int64 arrives with them.
    """

    def __init__(self, inner: nn.Module, k_embedding: torch.Tensor):
        super().__init__()
        self.inner = inner
        self.k_embedding = nn.Parameter(k_embedding)

    def forward(self, timestep: torch.Tensor, nfe: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        embedded: torch.Tensor = self.inner(timestep, resolution=None, aspect_ratio=None, **kwargs)
        return embedded + self.k_embedding[nfe].to(embedded.dtype)


def make_steps_aware(transformer: PixArtTransformer2DModel, nfe_set: tuple[int, ...]) -> None:
    """Gives a transformer a zero vector for each K of `nfe_set` (1 .. 64), in place."""
    if not nfe_set or min(nfe_set) < 1 or max(nfe_set) > MAX_NFE:
        raise ValueError(f"NFE counts {nfe_set} are not all in 1 .. {MAX_NFE}")
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    transformer.adaln_single.emb = StepsAwareEmbedding(transformer.adaln_single.emb, torch.zeros(max(nfe_set) + 1, width))


def fold(transformer: PixArtTransformer2DModel, nfe: int) -> torch.Tensor:
    """Turns a steps-aware transformer into a plain one that behaves as at `nfe`, in place; returns its K vectors."""
    embedding = transformer.adaln_single.emb
    assert isinstance(embedding, StepsAwareEmbedding)
    vectors = embedding.k_embedding.detach().clone()
    transformer.adaln_single.emb = embedding.inner
    transformer.adaln_single.emb.timestep_embedder.linear_2.bias.data += vectors[nfe]
    return vectors


def unfold(transformer: PixArtTransformer2DModel, vectors: torch.Tensor, nfe: int) -> None:
    """The inverse of `fold`, in place: `vectors` [K + 1, width] as it returned them."""
    transformer.adaln_single.emb.timestep_embedder.linear_2.bias.data -= vectors[nfe]
    transformer.adaln_single.emb = StepsAwareEmbedding(transformer.adaln_single.emb, vectors.clone())

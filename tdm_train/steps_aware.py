"""K-conditioning: the number of evaluations a trajectory has is an input of the student and of the fake score.

One learned vector per K, zero at the start (so an exact no-op), is added to the network's timestep embedding. For one K
it can be folded into a bias, which turns the network back into a plain diffusers model of that K. Every diffusers network
used here puts its timestep through one TimestepEmbedding, so one wrapper serves them all.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

MAX_NFE = 64
NAMES = (
    "timestep_embedder",
    "time_embedding",
    "time_embedder",
)  # what networks call it; they embed sizes and offsets by others


class StepsAwareEmbedding(nn.Module):
    """Takes the place of a network's TimestepEmbedding: the same embedding plus `k_embedding[nfe]`.

    `nfe` [B] int64 stands here for the time of one evaluation (see `told_nfe`), since no network's signature has room for it.
    """

    inner: TimestepEmbedding

    def __init__(self, inner: TimestepEmbedding, k_embedding: torch.Tensor):
        super().__init__()
        self.inner = inner
        self.k_embedding = nn.Parameter(k_embedding)
        self.nfe: torch.Tensor | None = None

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        if self.nfe is None:
            raise ValueError("a steps-aware network must be told nfe, int64 [B]: call its denoiser with it, or fold it")
        embedded: torch.Tensor = self.inner(sample, condition)
        return embedded + self.k_embedding[self.nfe].to(embedded.dtype)


def make_steps_aware(network: nn.Module, nfe_set: tuple[int, ...]) -> None:
    """Gives a network a zero vector for each K of `nfe_set` (1 .. 64), in place."""
    name, inner = timestep_embedding(network)
    network.set_submodule(name, StepsAwareEmbedding(inner, new_k_embedding(network, nfe_set)))


def new_k_embedding(network: nn.Module, nfe_set: tuple[int, ...]) -> torch.Tensor:
    """Zero vectors [max(nfe_set) + 1, width] for a network's timestep embedding; raises ValueError where it can have none."""
    if not nfe_set or min(nfe_set) < 1 or max(nfe_set) > MAX_NFE:
        raise ValueError(f"NFE counts {nfe_set} are not all in 1 .. {MAX_NFE}")
    name, inner = timestep_embedding(network)
    if not isinstance(inner, TimestepEmbedding) or inner.post_act is not None or inner.linear_2.bias is None:
        raise ValueError(f"{type(network).__name__}.{name} is {inner}: legal is a plain TimestepEmbedding that ends in a bias")
    weight: torch.Tensor = inner.linear_2.weight
    return weight.new_zeros(max(nfe_set) + 1, len(weight))


def fold(network: nn.Module, nfe: int) -> torch.Tensor:
    """Turns a steps-aware network into a plain one that behaves as at `nfe`, in place; returns its K vectors."""
    name, embedding = timestep_embedding(network)
    assert isinstance(embedding, StepsAwareEmbedding)
    vectors = embedding.k_embedding.detach().clone()
    embedding.inner.linear_2.bias.data += vectors[nfe]
    network.set_submodule(name, embedding.inner)
    return vectors


def unfold(network: nn.Module, vectors: torch.Tensor, nfe: int) -> None:
    """The inverse of `fold`, in place: `vectors` [K + 1, width] as it returned them."""
    _, inner = timestep_embedding(network)
    assert isinstance(inner, TimestepEmbedding)
    give_k_vectors(network, vectors)
    inner.linear_2.bias.data -= vectors[nfe]


def give_k_vectors(network: nn.Module, vectors: torch.Tensor) -> None:
    """Makes a plain network steps-aware with these vectors [K + 1, width], in place."""
    name, inner = timestep_embedding(network)
    assert isinstance(inner, TimestepEmbedding)
    if vectors.shape[1:] != inner.linear_2.bias.shape:
        raise ValueError(f"K vectors are {list(vectors.shape)}, legal for this network: [K + 1, {len(inner.linear_2.bias)}]")
    network.set_submodule(name, StepsAwareEmbedding(inner, vectors.clone()))


@contextmanager
def told_nfe(network: nn.Module, nfe: torch.Tensor | None) -> Iterator[None]:
    """Within it, a steps-aware network hears `nfe` [B] int64; a plain one is the same at every NFE and hears nothing."""
    _, embedding = timestep_embedding(network)
    if not isinstance(embedding, StepsAwareEmbedding):
        yield
        return
    embedding.nfe = nfe
    try:
        yield
    finally:
        embedding.nfe = None


def timestep_embedding(network: nn.Module) -> tuple[str, nn.Module]:
    """Name and module, plain or steps-aware, through which a network's timestep goes."""
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in NAMES and isinstance(module, (TimestepEmbedding, StepsAwareEmbedding)):
            return name, module
    raise ValueError(f"{type(network).__name__} has no TimestepEmbedding named {' or '.join(NAMES)}")

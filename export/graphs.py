"""One NFE as a graph, and the example inputs by which the graphs of a student are traced and checked."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from export.text_encoders import same_batch
from server.engine.student import GraphName
from tdm_train.denoiser import Denoiser, Text

Tensors = dict[str, torch.Tensor]


class StudentStep(nn.Module):
    """One NFE with the solver's update fused in: next = c0 * latents + c1 * x0 + c2 * x0_prev.

    latents, x0_prev: float32 [B, C, h, w], of videos [B, F, C, h, w]; timestep: float32 [B]; coefficients: float32 [B, 3];
    nfe: int64 [B], of steps-aware students; text_emb: float32 [B, L, D]; mask: int64 [B, L] and pooled: float32 [B, P], of the
    families that have them -> (next_latents, x0), float32 and shaped as latents. Every row has its own timestep, coefficients
    and nfe, so requests at different steps share a batch.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        latents: torch.Tensor,
        x0_prev: torch.Tensor,
        timestep: torch.Tensor,
        coefficients: torch.Tensor,
        nfe: torch.Tensor | None = None,
        text_emb: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert text_emb is not None
        given = (x0_prev, timestep, coefficients, nfe, text_emb, mask, pooled)
        same_batch(latents, *(tensor for tensor in given if tensor is not None))
        x0, _ = self.denoiser(latents, timestep, Text(text_emb, mask, pooled), nfe)
        c0, c1, c2 = (coefficients[:, column].reshape(-1, *(1,) * (latents.ndim - 1)) for column in range(3))
        return c0 * latents + c1 * x0 + c2 * x0_prev, x0


@dataclass(frozen=True)
class Graph:
    """One graph to export.

    module: in evaluation mode; example: (batch, latent shape) -> random inputs by name, the same for the same arguments;
    dynamic: input -> axis -> the name of its dimension; without any, the graph is for a batch of one.
    """

    name: GraphName
    module: nn.Module
    example: Callable[[int, tuple[int, ...]], Tensors]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]

    def batch(self, wanted: int) -> int:
        """The batch that can be run in place of the wanted one."""
        return wanted if self.dynamic else 1

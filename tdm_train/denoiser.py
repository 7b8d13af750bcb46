"""One interface for every network: (x_t, t, text) -> x0_hat, eps_hat. tdm_train/backbones has one denoiser per family."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tdm_train.schedule import NoiseSchedule
from tdm_train.steps_aware import told_nfe


@dataclass(frozen=True)
class Text:
    """Encoded prompts: `emb` float [B, L, D]; `mask` int64 [B, L], 0 on padding, or None for a network that attends to all of
    it; `pooled` float [B, P], one vector per prompt, or None for a network that takes none."""

    emb: torch.Tensor
    mask: torch.Tensor | None = None
    pooled: torch.Tensor | None = None

    def select(self, rows: torch.Tensor | slice) -> "Text":
        """The prompts of `rows`, int64 [N] or a slice."""
        return self._each(lambda part: part[rows])

    def to(self, device: torch.device | str) -> "Text":
        return self._each(lambda part: part.to(device))

    @staticmethod
    def concatenate(*texts: "Text") -> "Text":
        """All prompts of `texts`, which have the same length and the same parts."""
        return Text(
            torch.cat([text.emb for text in texts]),
            _concatenate_where_given([text.mask for text in texts]),
            _concatenate_where_given([text.pooled for text in texts]),
        )

    @staticmethod
    def unpadded(*texts: "Text") -> tuple["Text", ...]:
        """The same without the last tokens that are padding in every prompt: the mask hides them from the network, which
        is spared work. Texts without masks are attended to as they are, padding and all, and stay so."""
        masks = [text.mask for text in texts if text.mask is not None]
        if not masks:
            return texts
        assert len(masks) == len(texts)
        length = max(int(mask.any(0).nonzero().max()) + 1 for mask in masks)
        return tuple(
            replace(text, emb=text.emb[:, :length], mask=mask[:, :length]) for text, mask in zip(texts, masks, strict=True)
        )

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Text":
        mask, pooled = (None if part is None else change(part) for part in (self.mask, self.pooled))
        return Text(change(self.emb), mask, pooled)


def _concatenate_where_given(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    given = [part for part in parts if part is not None]
    assert len(given) in (0, len(parts))
    return torch.cat(given) if given else None


class Denoiser(nn.Module):
    """A diffusers network, plain (teacher) or steps-aware (student, fake score), under any NoiseSchedule.

    Args:
        network: the diffusers network. In half precision halve it alone (`denoiser.network.half()`): x_t, t and the results
            stay float32.
        schedule: what its output means.
        whole_timesteps: whether the network is told only the whole part of t, as DPM and DDIM samplers do (the flow-match
            sampler tells all of it). Flow coefficients use the exact t.
    """

    network: Any

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, whole_timesteps: bool = True):
        super().__init__()
        self.network, self.schedule, self.whole_timesteps = network, schedule, whole_timesteps

    def run_network(self, x_t: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        """The network's output, shaped as x_t. x_t and text.emb have the network's dtype; t is what it is to be told."""
        raise NotImplementedError

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, text: Text, nfe: torch.Tensor | None = None) -> torch.Tensor:
        """The network's own output (epsilon, v, x0 or flow) for x_t [B, ...], t [B].

        nfe: int64 [B], which a steps-aware network must be told and a plain one does not hear.
        """
        dtype = next(self.network.parameters()).dtype
        with told_nfe(self.network, nfe):
            told = t.floor() if self.whole_timesteps else t
            return self.run_network(x_t.to(dtype), told, replace(text, emb=text.emb.to(dtype)))

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, nfe: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (x0_hat, eps_hat), both float32 and shaped as x_t: [B, C, h, w], video [B, F, C, h, w]."""
        return self.schedule.x0_eps(x_t, self.predict(x_t, t, text, nfe), t)

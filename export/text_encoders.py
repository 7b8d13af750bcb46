"""The text encoders of each family as one graph: what a diffusers pipeline makes of tokens when there is no guidance.

Tokens and masks are int64 [B, L]; text_emb float32 [B, L, D] and pooled float32 [B, P], whatever the weights' precision.
"""

import torch
import torch.nn.functional as F
from torch import nn


def same_batch(first: torch.Tensor, *others: torch.Tensor) -> None:
    """Tells the exporter, which gives each input a batch symbol of its own, that they are one."""
    for other in others:
        torch._check(other.shape[0] == first.shape[0])  # type: ignore[no-untyped-call]


class MaskedT5(nn.Module):
    """PixArt: (tokens, mask) -> text_emb."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        same_batch(tokens, mask)
        text_emb: torch.Tensor = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return text_emb.float()


class LastHidden(nn.Module):
    """Stable Diffusion's CLIP and CogVideoX's T5, which reads padding too: tokens -> text_emb."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        text_emb: torch.Tensor = self.encoder(tokens).last_hidden_state
        return text_emb.float()


class SdxlTextEncoders(nn.Module):
    """SDXL: (tokens, tokens_2) -> (text_emb, pooled): the last hidden layer but one of both CLIPs side by side, and the
    second's projected end mark."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, tokens: torch.Tensor, tokens_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        same_batch(tokens, tokens_2)
        first = self.first(tokens, output_hidden_states=True)
        second = self.second(tokens_2, output_hidden_states=True)
        text_emb = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return text_emb.float(), second.text_embeds.float()


class Sd3TextEncoders(nn.Module):
    """Stable Diffusion 3: (tokens, tokens_2, tokens_3) -> (text_emb, pooled).

    Both CLIPs side by side, filled up with zeros to T5's width, then T5's positions behind theirs; pooled is both CLIPs' too.
    """

    def __init__(self, first: nn.Module, second: nn.Module, third: nn.Module):
        super().__init__()
        self.first, self.second, self.third = first, second, third

    def forward(
        self, tokens: torch.Tensor, tokens_2: torch.Tensor, tokens_3: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        same_batch(tokens, tokens_2, tokens_3)
        clips = [
            self.first(tokens, output_hidden_states=True),
            self.second(tokens_2, output_hidden_states=True),
        ]
        together = torch.cat([clip.hidden_states[-2] for clip in clips], dim=-1)
        t5 = self.third(tokens_3).last_hidden_state
        filled = F.pad(together, (0, t5.shape[-1] - together.shape[-1]))
        pooled = torch.cat([clip.text_embeds for clip in clips], dim=-1)
        return torch.cat([filled, t5], dim=-2).float(), pooled.float()

"""One interface for every network: (x_t, t, text) -> x0_hat, eps_hat."""

from dataclasses import dataclass

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from tdm_train.schedule import NoiseSchedule


@dataclass(frozen=True)
class Text:
    """Encoded prompts: `emb` float [B, L, D] and `mask` int64 [B, L], 0 on padding."""

    emb: torch.Tensor
    mask: torch.Tensor

    def select(self, rows: torch.Tensor) -> "Text":
        return Text(self.emb[rows], self.mask[rows])

    @staticmethod
    def concatenate(*texts: "Text") -> "Text":
        return Text(torch.cat([text.emb for text in texts]), torch.cat([text.mask for text in texts]))


class PixArtDenoiser(nn.Module):
    """PixArtTransformer2DModel, plain (teacher) or steps-aware (student, fake score), under any NoiseSchedule."""

    def __init__(self, transformer: PixArtTransformer2DModel, schedule: NoiseSchedule):
        super().__init__()
        self.transformer, self.schedule = transformer, schedule

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, text: Text, nfe: torch.Tensor | None = None) -> torch.Tensor:
        """The network's own output (epsilon, v or flow) for x_t [B, C, h, w], t [B], nfe int64 [B] or None.

        The network is told whole timesteps, as diffusers' DPM samplers do; coefficients use the exact ones.
        """
        conditions = {"resolution": None, "aspect_ratio": None} if nfe is None else {"nfe": nfe}
        prediction: torch.Tensor = self.transformer(
            x_t,
            encoder_hidden_states=text.emb,
            encoder_attention_mask=text.mask,
            timestep=t.floor(),
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]]  # PixArt may predict a variance too; no sampler here uses it

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, nfe: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (x0_hat, eps_hat), both float32 [B, C, h, w]."""
        return self.schedule.x0_eps(x_t, self.predict(x_t, t, text, nfe), t)

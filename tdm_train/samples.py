"""Pictures of fixed prompts from fixed noise, at intervals of a run: for people as PNG files, for the gates as numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from tdm_train.backbones.sizes import pixel_block
from tdm_train.denoiser import Text
from tdm_train.gates import Quality, refuse_collapse
from tdm_train.roles import Roles
from tdm_train.rollout import Denoise, guided, rollout
from tdm_train.tdm_recipe import TdmRecipe

TEACHER_STEPS = 25  # of the guided teacher that the student is compared with
SHOWN = 16  # pictures on a sheet
Judge = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Samples:
    """What is drawn: noise float32 [N, ...] and encoded prompts of as many rows, the empty prompt as often; judge: the share of
    pictures or clips that show all that their prompts state, where an evaluator can read them."""

    pipeline: Any
    noise: torch.Tensor
    text: Text
    empty: Text
    judge: Judge | None

    def latents(self, denoise: Denoise, roles: Roles, times: list[float]) -> torch.Tensor:
        """Latents at the end of a trajectory on a grid, rising from 0."""
        grid = torch.tensor(times, device=self.noise.device)
        return rollout(denoise, roles.schedule, self.noise, self.text, grid).states[0]

    def quality(self, latents: torch.Tensor) -> tuple[Quality, np.ndarray]:
        """The numbers of the gates, and the pictures themselves, of a clip the frame in the middle."""
        decoded = decode(self.pipeline, latents)
        pictures = decoded[:, decoded.shape[1] // 2] if decoded.ndim == 5 else decoded
        judged = self.judge(decoded) if self.judge else None
        return Quality(float(latents.square().mean().sqrt()), sharpness(pictures), judged), pictures


class Monitor:
    """Looks at the student every `recipe.sample_every` iterations."""

    def __init__(self, samples: Samples, roles: Roles, recipe: TdmRecipe, out: Path):
        self.samples, self.roles, self.recipe, self.out = samples, roles, recipe, out
        self.references: tuple[Quality, ...] = ()

    def due(self, step: int) -> bool:
        return self.recipe.sample_every > 0 and (step + 1) % self.recipe.sample_every == 0

    def look(self, step: int, write: bool) -> dict[str, float]:
        """Draws every K, writes a sheet of each where `write`, and returns the numbers of the largest. Raises BadRunError where
        they have collapsed: against the guided teacher, and the teacher in as few steps, which is what the student began as."""
        for nfe in sorted(self.recipe.nfe):
            latents = self.samples.latents(self.roles.student, self.roles, self.recipe.grid(nfe))
            quality, pictures = self.samples.quality(latents)
            if write:
                sheet(pictures[:SHOWN], self.out / "samples" / f"{step + 1:06d}_k{nfe}.png")
        refuse_collapse(quality, self.compared_with(), step)
        return quality.numbers()

    def compared_with(self) -> tuple[Quality, ...]:
        """The quality of the guided teacher in many steps, and of the teacher alone in the student's."""
        if not self.references:
            teacher, grid = self.roles.teacher, self.recipe.grid
            many = [grid(max(self.recipe.nfe))[-1] * i / TEACHER_STEPS for i in range(TEACHER_STEPS + 1)]
            until = self.recipe.of_nfe(self.recipe.guidance_until, max(self.recipe.nfe))
            taught = guided(teacher, self.samples.empty, self.recipe.guidance, until)
            runs = (taught, many), (teacher, grid(max(self.recipe.nfe)))
            self.references = tuple(
                self.samples.quality(self.samples.latents(run, self.roles, times))[0] for run, times in runs
            )
        return self.references


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> np.ndarray:
    """Latents of unit scale -> uint8 [B, H, W, 3]; of videos, [B, F, C, h, w] -> uint8 [B, frames, H, W, 3]."""
    vae = pipeline.vae.to(latents.device)
    if latents.ndim == 5:
        decoded = pipeline.decode_latents(latents.to(vae.dtype)).transpose(1, 2)
    else:
        scaled = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        decoded = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
    decoded = F.pixel_shuffle(decoded, pixel_block(vae.config))
    pixels = ((decoded.float().nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def sharpness(pictures: np.ndarray) -> float:
    """The mean over pictures, uint8 [B, H, W, 3], of the variance of the Laplacian of their grey values, which are 0 .. 1."""
    grey = torch.from_numpy(pictures).float().mean(3, keepdim=True).permute(0, 3, 1, 2) / 255
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).reshape(1, 1, 3, 3)
    return float(F.conv2d(grey, laplacian).flatten(1).var(1).mean())


def sheet(pictures: np.ndarray, file: Path) -> None:
    """Writes pictures [B, H, W, 3] side by side, in rows of at most 8, as a PNG file."""
    columns = min(len(pictures), 8)
    blank = np.zeros((-len(pictures) % columns, *pictures.shape[1:]), np.uint8)
    rows = np.split(np.concatenate([pictures, blank]), (len(pictures) + len(blank)) // columns)
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows])).save(file)

"""`fewstep eval-video`: do clips show what their captions say? Renders, autoencoder, teacher and students, side by side.

Every row makes one clip per held-out caption and lets the evaluator read it (tdm_train/scenes_video/evaluator.py), motion
and speed included.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.evaluation import Evaluation, Row
from tdm_train.checkpoint import open_pipeline
from tdm_train.scenes_video.autoencoder import to_blocks, to_clips
from tdm_train.scenes_video.captions import adherence, held_out_captions
from tdm_train.scenes_video.evaluator import load_evaluator
from tdm_train.scenes_video.teacher import latent_shape
from tdm_train.scenes_video.text_encoder import TEXT_LENGTH
from tdm_train.scenes_video.world import FRAMES, draw_clip, render_clips

REFERENCE_CLIPS = range(7 * 10**9, 7 * 10**9 + 2000)
CHUNK = 25


class VideoEvaluation(Evaluation):
    """Draws `count` held-out captions and judges clips of them, uint8 [n, F, H, W, 3]. `frechet` of its rows is the distance to
    renders of the held-out clips of `reference`."""

    def __init__(self, count: int, seed: int, reference: range = REFERENCE_CLIPS):
        self.clips, captions, claims = zip(*held_out_captions(count, seed), strict=True)
        evaluator, features = load_evaluator(), []
        for start in tqdm(range(0, len(reference), 100), desc="renders", leave=False):
            drawn = [draw_clip(clip, "held_out") for clip in reference[start : start + 100]]
            features.append(evaluator.look(render_clips(drawn))[0])
        super().__init__(captions, claims, seed, evaluator, adherence, np.concatenate(features), CHUNK)

    def rendered(self) -> Row:
        return self.row("rendered", 0, 1.0, lambda part: render_clips(list(self.clips[part])))


class VideoTeacher:
    """A diffusers teacher folder, run by diffusers' own pipeline."""

    def __init__(self, folder: Path, evaluation: VideoEvaluation):
        self.pipeline, self.evaluation = open_pipeline(folder), evaluation
        self.shape = latent_shape(self.pipeline.transformer)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        vae = self.pipeline.vae
        return to_clips(vae.decode((latents / vae.config.scaling_factor).transpose(1, 2)).sample).numpy()

    def autoencoder(self) -> Row:
        """The ceiling: renders encoded and decoded again."""

        @torch.no_grad()
        def draw(part: slice) -> np.ndarray:
            blocks = to_blocks(torch.from_numpy(render_clips(list(self.evaluation.clips[part]))))
            latents = self.pipeline.vae.encode(blocks).latent_dist.mean
            return self.decode(latents.transpose(1, 2) * self.pipeline.vae.config.scaling_factor)

        return self.evaluation.row("autoencoder", 0, 1.0, draw)

    def row(self, steps: int, guidance: float) -> Row:
        """`steps` DDIM steps; with guidance every step is two evaluations."""

        def draw(part: slice) -> np.ndarray:
            side = self.pipeline.transformer.config.sample_height * self.pipeline.vae_scale_factor_spatial
            latents = self.pipeline(
                list(self.evaluation.captions[part]),
                num_frames=FRAMES,
                height=side,
                width=side,
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=self.evaluation.noise(part, self.shape),
                output_type="latent",
                max_sequence_length=TEXT_LENGTH,
            ).frames
            return self.decode(latents)

        return self.evaluation.row("teacher", steps * (1 if guidance == 1 else 2), guidance, draw)

"""`fewstep eval`: do pictures show what their captions say? Renders, autoencoder, teacher and student, side by side.

Every row makes one picture per held-out caption and lets the evaluator read it (tdm_train/scenes/evaluator.py).
"""

import io
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.evaluation import Evaluation, Row
from tdm_train.checkpoint import open_pipeline
from tdm_train.scenes.autoencoder import to_blocks, to_image
from tdm_train.scenes.evaluator import adherence, load_evaluator
from tdm_train.scenes.prompts import held_out_captions
from tdm_train.scenes.world import draw_scene, render_batch

REFERENCE_SCENES = range(7 * 10**9, 7 * 10**9 + 4000)
CHUNK = 50


class SceneEvaluation(Evaluation):
    """Draws `count` held-out captions and judges pictures of them, uint8 [n, H, W, 3]. `frechet` of its rows is the distance to
    renders of 4,000 other held-out scenes."""

    def __init__(self, count: int, seed: int):
        self.scenes, captions, claims = zip(*held_out_captions(count, seed), strict=True)
        evaluator = load_evaluator()
        reference = render_batch(
            [draw_scene(scene, "held_out") for scene in tqdm(REFERENCE_SCENES, desc="renders", leave=False)]
        )
        super().__init__(captions, claims, seed, evaluator, adherence, evaluator.look(reference)[0], CHUNK)

    def rendered(self) -> Row:
        return self.row("rendered", 0, 1.0, lambda part: render_batch(list(self.scenes[part])))


class SceneTeacher:
    """A diffusers teacher folder, run by diffusers' own pipeline."""

    def __init__(self, folder: Path, evaluation: SceneEvaluation):
        self.pipeline, self.evaluation = open_pipeline(folder), evaluation
        config = self.pipeline.transformer.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        vae = self.pipeline.vae
        return to_image(vae.decode(latents / vae.config.scaling_factor).sample).numpy()

    def autoencoder(self) -> Row:
        """The ceiling: renders encoded and decoded again."""

        @torch.no_grad()
        def draw(part: slice) -> np.ndarray:
            pictures = torch.from_numpy(render_batch(list(self.evaluation.scenes[part])))
            latents = self.pipeline.vae.encode(to_blocks(pictures)).latent_dist.mean
            return self.decode(latents * self.pipeline.vae.config.scaling_factor)

        return self.evaluation.row("autoencoder", 0, 1.0, draw)

    def row(self, steps: int, guidance: float) -> Row:
        """`steps` DPM-Solver++ steps; with guidance every step is two evaluations."""

        def draw(part: slice) -> np.ndarray:
            latents = self.pipeline(
                list(self.evaluation.captions[part]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=self.evaluation.noise(part, self.shape),
                output_type="latent",
                max_sequence_length=32,
                use_resolution_binning=False,
                clean_caption=False,
            ).images
            return self.decode(latents)

        return self.evaluation.row("teacher", steps * (1 if guidance == 1 else 2), guidance, draw)


def caller(url: str, api_key: str | None) -> httpx.Client:
    """What asks a running server, with its key where it wants one."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url, timeout=60, headers=headers)


def counts_of(server: httpx.Client) -> list[int]:
    """The NFE counts of a server's default student. Raises ValueError for a server that does not tell."""
    try:
        answer = server.get("/v1/models")
    except httpx.TransportError as error:
        raise ValueError(f"{server.base_url} cannot be reached: {error}") from None
    if answer.status_code != 200:
        raise ValueError(f"{answer.url} answered {answer.status_code}: {answer.text[:300]}")
    legal: list[int] = answer.json()["data"][0]["nfe"]
    return legal


def server_rows(server: httpx.Client, nfe_counts: list[int], evaluation: SceneEvaluation) -> list[Row]:
    """A running fewstep server, asked for one PNG per caption."""

    def draw(nfe: int, part: slice) -> np.ndarray:
        return np.stack([ask(nfe, number) for number in evaluation.numbers(part)])

    def ask(nfe: int, number: int) -> np.ndarray:
        body = {"prompt": evaluation.captions[number], "num_inference_steps": nfe, "seed": evaluation.noise_seed(number)}
        response = server.post("/v1/images/generations", json=body, headers={"accept": "image/png"})
        if response.status_code != 200:
            raise ValueError(f"{response.url} answered {response.status_code}: {response.text[:300]}")
        return np.asarray(Image.open(io.BytesIO(response.content)).convert("RGB"))

    return [evaluation.row("student", nfe, 1.0, lambda part, nfe=nfe: draw(nfe, part)) for nfe in nfe_counts]

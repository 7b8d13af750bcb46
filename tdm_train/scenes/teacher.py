"""The scenes teacher: a small PixArt transformer trained from scratch on captioned renders, under a frozen T5 encoder."""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from tdm_train.backbones.pixart import PixArtDenoiser
from tdm_train.checkpoint import open_pipeline
from tdm_train.denoiser import Text
from tdm_train.recipes import TeacherRecipe
from tdm_train.run import Run
from tdm_train.scenes.autoencoder import to_blocks
from tdm_train.scenes.captions import caption
from tdm_train.scenes.text_encoder import new_tokenizer
from tdm_train.scenes.world import draw_scene, render
from tdm_train.schedule import TRAIN_TIMESTEPS, NoiseSchedule

SCHEDULE = NoiseSchedule("flow_prediction")


def new_transformer() -> PixArtTransformer2DModel:
    """An untrained PixArt transformer: 6 layers of width 192 over 16 tokens (8 x 8 latents, patches of 2)."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        num_layers=6,
        cross_attention_dim=192,
        sample_size=8,
        patch_size=2,
        caption_channels=96,
        use_additional_conditions=False,
    )
    transformer.set_attn_processor(AttnProcessor())
    return transformer


def teacher_sampler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order over flow sigmas, as diffusers has it."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, solver_order=2, final_sigmas_type="zero"
    )


def encode_scenes(vae: AutoencoderKL, seeds: range, file: Path) -> np.ndarray:
    """Latents of the scenes of `seeds`, scaled to unit variance: float16 [N, 8, 8, 8], kept in `file`."""
    if file.exists():
        return np.load(file, mmap_mode="r")
    latents = np.empty((len(seeds), 8, 8, 8), np.float16)
    for start in tqdm(range(0, len(seeds), 100), desc="encoding scenes", dynamic_ncols=True, mininterval=5):
        images = np.stack([render(draw_scene(seed)) for seed in seeds[start : start + 100]])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(to_blocks(torch.from_numpy(images))).latent_dist.mean
        latents[start : start + 100] = (mean.float() * vae.config.scaling_factor).numpy()
    partial = file.with_suffix(".partial.npy")
    np.save(partial, latents)
    partial.rename(file)
    return latents


class TeacherLoss(nn.Module):
    """Flow matching; a module so that gradients synchronise between processes."""

    def __init__(self, transformer: PixArtTransformer2DModel):
        super().__init__()
        self.denoiser = PixArtDenoiser(transformer, SCHEDULE)

    def forward(self, x0: torch.Tensor, text: Text, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the flow at x_t for x0, eps [B, 8, 8, 8] and t [B]."""
        prediction = self.denoiser.predict(SCHEDULE.add_noise(x0, eps, t), t, text)
        return (prediction.float() - SCHEDULE.network_target(x0, eps, t)).square().mean()


def draw_timesteps(batch: int, shift: float, device: torch.device) -> torch.Tensor:
    """[B] in 0 .. 1000: logit-normal (Esser et al. 2024), a quarter uniform so that the ends are learned too.

    `shift` > 1 moves the logit-normal towards noise, where it is decided what is drawn rather than how sharply.
    """
    normal = torch.sigmoid(torch.randn(batch, device=device) + math.log(shift))
    uniform = torch.rand(batch, device=device)
    return TRAIN_TIMESTEPS * torch.where(torch.rand(batch, device=device) < 0.25, uniform, normal)


def draw_captions(seeds: np.ndarray, epoch: int, dropout: float) -> list[str]:
    """Fresh captions of scenes, another wording in each epoch; a share `dropout` is the empty caption."""
    texts = []
    for seed in seeds:
        rng = np.random.Generator(np.random.Philox(key=[int(seed), 10 + epoch]))
        text, _ = caption(draw_scene(int(seed)), rng)
        texts.append("" if rng.random() < dropout else text)
    return texts


@torch.no_grad()
def encode_text(tokenizer: PreTrainedTokenizerFast, text_encoder: T5EncoderModel, texts: list[str]) -> Text:
    """Texts on the text encoder's device: emb [B, L, D], mask [B, L], padded to a multiple of 4 tokens."""
    encoded = tokenizer(texts, padding=True, pad_to_multiple_of=4, return_tensors="pt").to(text_encoder.device)
    emb = text_encoder(encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
    return Text(emb, encoded.attention_mask)


def train_teacher(recipe: TeacherRecipe, out: Path, resume: bool) -> None:
    """Encodes the training scenes with the autoencoder of `recipe.vae`, trains, and saves a diffusers pipeline folder."""
    run = Run(out, recipe, resume)
    vae = AutoencoderKL.from_pretrained(recipe.vae).to(memory_format=torch.channels_last)
    vae.set_attn_processor(AttnProcessor())
    text_encoder = T5EncoderModel.from_pretrained(recipe.text_encoder, dtype=torch.float32).to(run.device).eval()
    share = recipe.scenes // run.processes
    seeds = range(run.rank * share, (run.rank + 1) * share)
    latents = encode_scenes(vae, seeds, out / f"latents_{run.rank}_of_{run.processes}_{recipe.scenes}.npy")
    tokenizer = new_tokenizer()
    torch.manual_seed(recipe.seed)
    module = TeacherLoss(open_pipeline(recipe.start).transformer if recipe.start else new_transformer())
    torch.manual_seed(recipe.seed * 1000 + run.rank)
    loss_of, optimizer = run.prepare(module, recipe.lr, recipe.warmup, recipe.ema, betas=(0.9, 0.99), weight_decay=0.01)
    smooth = 1.0
    for step in run.steps():
        epoch, rng = step * recipe.batch // share, np.random.Generator(np.random.Philox(key=[recipe.seed, step]))
        rows = np.sort(rng.integers(share, size=recipe.batch))
        x0 = torch.from_numpy(latents[rows].astype(np.float32)).to(run.device)
        text = encode_text(tokenizer, text_encoder, draw_captions(rows + seeds.start, epoch, recipe.text_dropout))
        t = draw_timesteps(recipe.batch, recipe.noise_shift, run.device)
        loss = loss_of(x0, text, t, torch.randn_like(x0))
        run.update(loss, loss_of, optimizer)
        smooth += 0.01 * (float(loss.detach()) - smooth)
        run.end_step(loss=smooth)
    if run.rank == 0:
        save_teacher(run.averages[0][0].module, text_encoder, vae, tokenizer, out / "teacher")


def save_teacher(
    module: TeacherLoss,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKL,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` opens, weights in half precision."""
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=module.denoiser.network,
        scheduler=teacher_sampler(),
    )
    pipeline.to(torch.float16).save_pretrained(folder)

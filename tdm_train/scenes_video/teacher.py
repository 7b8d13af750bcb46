"""The teacher of clips: a small CogVideoX transformer trained from scratch on captioned renders, under a frozen T5 encoder."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from tdm_train.checkpoint import open_pipeline
from tdm_train.plain_attention import JointAttention
from tdm_train.recipes import MotionTeacherRecipe
from tdm_train.run import Run
from tdm_train.scenes_video.autoencoder import LATENT_CHANNELS, to_blocks
from tdm_train.scenes_video.captions import caption
from tdm_train.scenes_video.text_encoder import TEXT_LENGTH, new_tokenizer, tokenize
from tdm_train.scenes_video.world import draw_clip, render_clips
from tdm_train.schedule import TRAIN_TIMESTEPS, NoiseSchedule


def new_transformer() -> CogVideoXTransformer3DModel:
    """An untrained CogVideoX transformer: 6 layers of width 192 over 16 video tokens (4 x 4 x 4 latents, patches of
    2 x 2) and 16 text tokens."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=192,
        text_embed_dim=96,
        num_layers=6,
        sample_width=4,
        sample_height=4,
        sample_frames=13,  # 4 latent frames, as the class counts them: else it makes its positions anew in every evaluation
        patch_size=2,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
    )
    transformer.set_attn_processor(JointAttention())
    return transformer


def latent_shape(transformer: CogVideoXTransformer3DModel) -> tuple[int, int, int, int]:
    """Latent frames, channels, height and width of one clip, as the transformer takes them."""
    config = transformer.config
    return (
        (config.sample_frames - 1) // config.temporal_compression_ratio + 1,
        config.in_channels,
        config.sample_height,
        config.sample_width,
    )


def teacher_sampler(snr_shift: float) -> CogVideoXDDIMScheduler:
    """DDIM of v-prediction under a schedule whose last step is pure noise, as CogVideoX has it. `snr_shift` divides the
    signal-to-noise ratio of every step."""
    return CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def encode_clips(vae: AutoencoderKLCogVideoX, seeds: range, file: Path) -> np.ndarray:
    """Latents of the clips of `seeds`, scaled to unit variance: float16 [N, 4, 16, 4, 4], kept in `file`."""
    if file.exists():
        return np.load(file, mmap_mode="r")
    chunks = []
    for start in tqdm(range(0, len(seeds), 50), desc="encoding clips", dynamic_ncols=True, mininterval=5):
        frames = torch.from_numpy(render_clips([draw_clip(seed) for seed in seeds[start : start + 50]]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(to_blocks(frames)).latent_dist.mean
        chunks.append((mean.float() * vae.config.scaling_factor).transpose(1, 2).half().numpy())
    latents = np.concatenate(chunks)
    partial = file.with_suffix(".partial.npy")
    np.save(partial, latents)
    partial.rename(file)
    return latents


class TeacherLoss(nn.Module):
    """v-prediction; a module so that gradients synchronise between processes."""

    def __init__(self, transformer: CogVideoXTransformer3DModel, schedule: NoiseSchedule):
        super().__init__()
        self.transformer, self.schedule = transformer, schedule

    def forward(self, x0: torch.Tensor, text_emb: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Mean squared error of v at x_t for x0, eps [B, 4, 16, 4, 4], text_emb [B, 16, 96] and t int64 [B]."""
        x_t = self.schedule.add_noise(x0, eps, t)
        prediction = self.transformer(x_t, encoder_hidden_states=text_emb, timestep=t, return_dict=False)[0]
        return (prediction.float() - self.schedule.network_target(x0, eps, t)).square().mean()


def draw_captions(seeds: np.ndarray, epoch: int, dropout: float) -> list[str]:
    """Fresh captions of clips, another wording in each epoch; a share `dropout` is the empty caption."""
    texts = []
    for seed in seeds:
        rng = np.random.Generator(np.random.Philox(key=[int(seed), 10 + epoch]))
        text, _ = caption(draw_clip(int(seed)), rng)
        texts.append("" if rng.random() < dropout else text)
    return texts


def train_teacher(recipe: MotionTeacherRecipe, out: Path, resume: bool) -> None:
    """Encodes the training clips with the autoencoder of `recipe.vae`, trains, and saves a diffusers pipeline folder."""
    run = Run(out, recipe, resume)
    vae = AutoencoderKLCogVideoX.from_pretrained(recipe.vae)
    text_encoder = T5EncoderModel.from_pretrained(recipe.text_encoder, dtype=torch.float32).to(run.device).eval()
    share = recipe.clips // run.processes
    seeds = range(run.rank * share, (run.rank + 1) * share)
    latents = encode_clips(vae, seeds, out / f"latents_{run.rank}_of_{run.processes}_{recipe.clips}.npy")
    tokenizer, sampler = new_tokenizer(), teacher_sampler(recipe.snr_shift)
    torch.manual_seed(recipe.seed)
    transformer = open_pipeline(recipe.start).transformer if recipe.start else new_transformer()
    module = TeacherLoss(transformer, NoiseSchedule("v_prediction", sampler.alphas_cumprod.float()))
    torch.manual_seed(recipe.seed * 1000 + run.rank)
    loss_of, optimizer = run.prepare(module, recipe.lr, recipe.warmup, recipe.ema, betas=(0.9, 0.99), weight_decay=0.01)
    smooth = 1.0
    for step in run.steps():
        epoch, rng = step * recipe.batch // share, np.random.Generator(np.random.Philox(key=[recipe.seed, step]))
        rows = np.sort(rng.integers(share, size=recipe.batch))
        x0 = torch.from_numpy(latents[rows].astype(np.float32)).to(run.device)
        tokens = tokenize(tokenizer, draw_captions(rows + seeds.start, epoch, recipe.text_dropout))
        with torch.no_grad():
            text_emb = text_encoder(tokens.to(run.device)).last_hidden_state
        t = torch.randint(1, TRAIN_TIMESTEPS, (recipe.batch,), device=run.device)
        loss = loss_of(x0, text_emb, t, torch.randn_like(x0))
        run.update(loss, loss_of, optimizer)
        smooth += 0.01 * (float(loss.detach()) - smooth)
        run.end_step(loss=smooth)
    if run.rank == 0:
        save_teacher(run.averages[0][0].module.transformer, text_encoder, vae, tokenizer, sampler, out / "teacher")


def save_teacher(
    transformer: CogVideoXTransformer3DModel,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKLCogVideoX,
    tokenizer: PreTrainedTokenizerFast,
    sampler: CogVideoXDDIMScheduler,
    folder: Path,
) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` opens, weights in half precision."""
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=sampler
    )
    pipeline.to(torch.float16).save_pretrained(folder)

"""The scenes teacher: a small PixArt transformer with a T5 encoder, trained from scratch on captioned renders."""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from tdm_train.checkpoint import open_teacher
from tdm_train.denoiser import PixArtDenoiser, Text
from tdm_train.recipes import TeacherRecipe
from tdm_train.run import Run
from tdm_train.scenes.autoencoder import to_blocks
from tdm_train.scenes.captions import caption, vocabulary
from tdm_train.scenes.world import draw_scene, render
from tdm_train.schedule import TRAIN_TIMESTEPS, NoiseSchedule

TEXT_LENGTH = 32
SCHEDULE = NoiseSchedule("flow_prediction")


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world's captions, lower-cased, closed by `</s>`; other words become `<unk>`."""
    words = ("<pad>", "</s>", "<unk>", *vocabulary())
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


def new_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    """An untrained T5 encoder: 2 layers of width 96."""
    config = T5Config(
        vocab_size=vocabulary_size, d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0
    )
    return T5EncoderModel(config)


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
    """Flow matching with the text encoder trained along; a module so that gradients synchronise between processes."""

    def __init__(self, transformer: PixArtTransformer2DModel, text_encoder: T5EncoderModel):
        super().__init__()
        self.denoiser, self.text_encoder = PixArtDenoiser(transformer, SCHEDULE), text_encoder

    def forward(
        self, x0: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error of the flow at x_t for x0, eps [B, 8, 8, 8], tokens and mask [B, L], t [B]."""
        text = Text(self.text_encoder(tokens, attention_mask=mask).last_hidden_state, mask)
        prediction = self.denoiser.predict(SCHEDULE.add_noise(x0, eps, t), t, text)
        return (prediction.float() - SCHEDULE.network_target(x0, eps, t)).square().mean()


def draw_timesteps(batch: int, shift: float, device: torch.device) -> torch.Tensor:
    """[B] in 0 .. 1000: logit-normal (Esser et al. 2024), a quarter uniform so that the ends are learned too.

    `shift` > 1 moves the logit-normal towards noise, where it is decided what is drawn rather than how sharply.
    """
    normal = torch.sigmoid(torch.randn(batch, device=device) + math.log(shift))
    uniform = torch.rand(batch, device=device)
    return TRAIN_TIMESTEPS * torch.where(torch.rand(batch, device=device) < 0.25, uniform, normal)


def draw_tokens(
    tokenizer: PreTrainedTokenizerFast, seeds: np.ndarray, epoch: int, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh captions of scenes -> (tokens, mask), each int64 [B, L]; a share `dropout` is the empty caption."""
    texts = []
    for seed in seeds:
        rng = np.random.Generator(np.random.Philox(key=[int(seed), 10 + epoch]))
        text, _ = caption(draw_scene(int(seed)), rng)
        texts.append("" if rng.random() < dropout else text)
    encoded = tokenizer(texts, padding=True, pad_to_multiple_of=4, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def train_teacher(recipe: TeacherRecipe, out: Path, resume: bool) -> None:
    """Encodes the training scenes with the autoencoder of `recipe.vae`, trains, and saves a diffusers pipeline folder."""
    run = Run(out, recipe.iterations, recipe.seed, resume)
    vae = AutoencoderKL.from_pretrained(recipe.vae).to(memory_format=torch.channels_last)
    vae.set_attn_processor(AttnProcessor())
    share = recipe.scenes // run.processes
    seeds = range(run.rank * share, (run.rank + 1) * share)
    latents = encode_scenes(vae, seeds, out / f"latents_{run.rank}_of_{run.processes}_{recipe.scenes}.npy")
    tokenizer = new_tokenizer()
    torch.manual_seed(recipe.seed)
    module = start_weights(recipe, len(tokenizer))
    torch.manual_seed(recipe.seed * 1000 + run.rank)
    loss_of, optimizer = run.prepare(module, recipe.lr, recipe.warmup, recipe.ema, betas=(0.9, 0.99), weight_decay=0.01)
    smooth = 1.0
    for step in run.steps():
        epoch, rng = step * recipe.batch // share, np.random.Generator(np.random.Philox(key=[recipe.seed, step]))
        rows = np.sort(rng.integers(share, size=recipe.batch))
        x0 = torch.from_numpy(latents[rows].astype(np.float32)).to(run.device)
        tokens, mask = draw_tokens(tokenizer, rows + seeds.start, epoch, recipe.text_dropout)
        t = draw_timesteps(recipe.batch, recipe.noise_shift, run.device)
        loss = loss_of(x0, tokens.to(run.device), mask.to(run.device), t, torch.randn_like(x0))
        run.update(loss, loss_of, optimizer)
        smooth += 0.01 * (float(loss.detach()) - smooth)
        run.end_step(loss=smooth)
    if run.rank == 0:
        save_teacher(run.averages[0][0].module, vae, tokenizer, out / "teacher")


def start_weights(recipe: TeacherRecipe, vocabulary_size: int) -> TeacherLoss:
    """Untrained networks, or those of the teacher folder that the recipe goes on from."""
    if not recipe.start:
        return TeacherLoss(new_transformer(), new_text_encoder(vocabulary_size))
    pipeline = open_teacher(Path(recipe.start))
    return TeacherLoss(pipeline.transformer, pipeline.text_encoder)


def save_teacher(module: TeacherLoss, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a folder that `DiffusionPipeline.from_pretrained` opens, weights in half precision."""
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=module.text_encoder,
        vae=vae,
        transformer=module.denoiser.transformer,
        scheduler=teacher_sampler(),
    )
    pipeline.to(torch.float16).save_pretrained(folder)

"""Random-weight pipelines of every backbone: the real classes, tokenizers and schedulers, in a few hundred kB each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderTiny,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tdm_train.backbones import backbone_of
from tdm_train.checkpoint import open_pipeline, save_student
from tdm_train.description import Description
from tdm_train.steps_aware import make_steps_aware, timestep_embedding

PROMPTS = ["a red circle above a blue square", "a large star, black background"]
WORDS = ("red", "blue", "circle", "square", "above", "star", "large", "black")
LETTERS = "abcdefghijklmnopqrstuvwxyz,.!"
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
T5_LENGTH, CLIP_LENGTH = 24, 77
WIDTH, HEIGHT, FRAMES = 48, 32, 17  # not square, so that a swap of the two is seen; two chunks of a video
LADDER = [1, 2, 3, 4]
VIDEOS = ("cogvideox_2b", "cogvideox_5b")
RELEASED_GRID = {4: [999.0, 856.0, 665.0, 399.0]}  # of TDM's CogVideoX-2B


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Byte-pair encoding as CLIP's, with "!" as id 0 and the end token last, and a few whole words."""
    pieces = ["!", *sorted(set(LETTERS) - {"!"}), *(f"{letter}</w>" for letter in LETTERS)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
    merges = list(dict.fromkeys(merges))
    pieces += dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocabulary, merges, pad_token=pad_token, model_max_length=CLIP_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    """Unigrams as T5's: letters and a few whole words."""
    pieces = [("▁", -2.0), *((letter, -5.0) for letter in LETTERS), *((f"▁{word}", -1.0) for word in WORDS)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
    return T5Tokenizer(vocabulary, extra_ids=0, model_max_length=512)


def clip(tokenizer: CLIPTokenizer, width: int, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=0,
        eos_token_id=2,  # as in the published folders: the end token is then found as the largest id
        pad_token_id=1,
        initializer_range=0.5,
        initializer_factor=5.0,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def autoencoder(**fields: Any) -> AutoencoderKL:
    """4 pixels per latent."""
    widths = (8, 8, 16)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **fields,
    )


def tiny_autoencoder() -> AutoencoderTiny:
    """The small decoder that may take the place of `autoencoder`: 4 pixels per latent too."""
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    counts = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    return AutoencoderTiny(latent_channels=4, scaling_factor=0.5, **blocks, **counts)


def pixart_transformer(sample_size: int) -> PixArtTransformer2DModel:
    """With a learned variance; at sample_size 128 it is told the picture's size, as PixArt-alpha's at 1024 pixels is."""
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        caption_channels=16,
    )


def pixart_alpha() -> PixArtAlphaPipeline:
    tokenizer = t5_tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.0001, beta_end=0.02, clip_sample=False, timestep_spacing="trailing", prediction_type="epsilon"
    )
    return PixArtAlphaPipeline(tokenizer, t5(tokenizer, 16), autoencoder(), pixart_transformer(128), scheduler)


def pixart_sigma() -> PixArtSigmaPipeline:
    tokenizer = t5_tokenizer()
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, solver_order=2)
    return PixArtSigmaPipeline(tokenizer, t5(tokenizer, 16), autoencoder(), pixart_transformer(16), scheduler)


def unet(**fields: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4, **fields
    )


def stable_diffusion() -> StableDiffusionPipeline:
    tokenizer = clip_tokenizer()
    network = unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    scheduler = DDIMScheduler(**SCALED_LINEAR, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    encoder = clip(tokenizer, 16)
    return StableDiffusionPipeline(
        autoencoder(), encoder, tokenizer, network, scheduler, None, None, requires_safety_checker=False
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Two tokenizers as the published ones: the first pads with the end token, the second with "!"."""
    first, second = clip_tokenizer(), clip_tokenizer(pad_token="!")
    network = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 24,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    scheduler = DPMSolverMultistepScheduler(**SCALED_LINEAR, timestep_spacing="leading", steps_offset=1)
    encoders = clip(first, 16), clip(second, 24, projected=True)
    return StableDiffusionXLPipeline(autoencoder(), *encoders, first, second, network, scheduler, add_watermarker=False)


def sd3() -> StableDiffusion3Pipeline:
    """With the normed queries and the doubled attention of 3.5 Medium."""
    first, second, third = clip_tokenizer(), clip_tokenizer(pad_token="!"), t5_tokenizer()
    network = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=24,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = autoencoder(shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False)
    encoders = clip(first, 16, projected=True), first, clip(second, 24, projected=True), second, t5(third, 48), third
    return StableDiffusion3Pipeline(network, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *encoders)


def cogvideox(rotary: bool) -> CogVideoXPipeline:
    """8 pixels and 4 frames per latent; rotary: as 5B, else as 2B."""
    tokenizer = t5_tokenizer()
    network = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=2,
        sample_width=WIDTH // 8,
        sample_height=HEIGHT // 8,
        sample_frames=FRAMES,
        max_text_seq_length=T5_LENGTH,
        use_rotary_positional_embeddings=rotary,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7 if rotary else 1.15258426,
    )
    scheduler = CogVideoXDDIMScheduler(
        snr_shift_scale=1.0 if rotary else 3.0,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return CogVideoXPipeline(tokenizer, t5(tokenizer, 16), vae, network, scheduler)


MINIATURES: dict[str, Callable[[], Any]] = {
    "pixart_alpha": pixart_alpha,
    "pixart_sigma": pixart_sigma,
    "stable_diffusion": stable_diffusion,
    "sdxl": sdxl,
    "sd3": sd3,
    "cogvideox_2b": lambda: cogvideox(rotary=False),
    "cogvideox_5b": lambda: cogvideox(rotary=True),
}


def save_miniature(name: str, folder: Path) -> Path:
    """Writes the miniature `name` as a diffusers folder and returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MINIATURES[name]().save_pretrained(folder)
    return folder


def describe(name: str, family: str, **changes: Any) -> Description:
    """What student.json says of a miniature."""
    video = name in VIDEOS
    fields = {
        "name": name.replace("_", "-"),
        "family": family,
        "base": "random",
        "revision": "0",
        "nfe": LADDER,
        "default_nfe": 4,
        "text_length": 77 if family in ("stable_diffusion", "sdxl") else 24,
        "sizes": ["48x32"] if video else ["64x64", "48x32"],
        "frames": FRAMES if video else None,
        "fps": 8 if video else None,
        "k_conditioning": True,
        "adapter_scale": None,
        "training": {},
    }
    return Description.model_validate(fields | changes)


def save_miniature_student(name: str, folder: Path, sampler: Any = None, **changes: Any) -> Path:
    """A steps-aware student of a miniature with random K vectors, saved the way training does."""
    teacher = open_pipeline(save_miniature(name, folder / "teacher"))
    backbone = backbone_of(teacher)
    network, described = getattr(teacher, backbone.NETWORK), describe(name, backbone.FAMILY, **changes)
    if described.k_conditioning:
        make_steps_aware(network, tuple(described.nfe))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            torch.nn.init.normal_(timestep_embedding(network)[1].k_embedding)
    save_student(teacher, network, described, folder / "student", sampler)
    return folder / "student"

"""What is particular to exporting each family of students: its text encoder, its tokenisers, its sizes, its pipeline's call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, normalizers
from torch import nn

from export.graphs import StudentStep
from export.text_encoders import LastHidden, MaskedT5, Sd3TextEncoders, SdxlTextEncoders
from server.engine.student import Condition, TokenizerFile, TokenizerSettings
from tdm_train.checkpoint import Student

TOKENIZER_FILES: tuple[TokenizerFile, ...] = ("tokenizer.json", "tokenizer_2.json", "tokenizer_3.json")
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One family of students.

    text_encoder: the pipeline's text encoders as one module; conditions: what student_step is told; tokenizers: how the tokens
    of each tokeniser are padded; any_length: which of them may be padded to any length, if any; latent_step: latents' sides are
    multiples of it; call: arguments of the pipeline beside prompts, NFE and latents of the given shape; lowercase: whether the
    pipeline lowers and strips prompts; step: makes student_step fit for ONNX.
    """

    text_encoder: Callable[[Any], nn.Module]
    conditions: tuple[Condition, ...]
    tokenizers: Callable[[Student], list[TokenizerSettings]]
    latent_step: Callable[[Any], int]
    call: Callable[[Student, Sequence[int]], Arguments]
    any_length: int | None = None
    lowercase: bool = False
    step: Callable[[StudentStep], StudentStep] = lambda step: step

    @staticmethod
    def tokenizer(pipeline: Any, place: int) -> Any:
        """The pipeline's tokeniser at `place` (0 ..)."""
        return getattr(pipeline, f"tokenizer_{place + 1}" if place else "tokenizer")

    def tokenizer_files(self, student: Student) -> dict[str, Tokenizer]:
        """File name -> a tokeniser that does all that the pipeline does to a prompt, and neither pads nor truncates."""
        files: dict[str, Tokenizer] = {}
        for place, settings in enumerate(self.tokenizers(student)):
            tokenizer = Tokenizer.from_str(self.tokenizer(student.pipeline, place).backend_tokenizer.to_str())
            tokenizer.no_padding()
            tokenizer.no_truncation()
            if self.lowercase:
                kept = [tokenizer.normalizer] if tokenizer.normalizer else []
                tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip(), *kept])
            files[settings.file] = tokenizer
        return files


def clip_tokens(student: Student, place: int, truncates: bool = False) -> TokenizerSettings:
    """A CLIP tokeniser pads to all that its encoder has positions for, with the token that it was trained with."""
    tokenizer = Family.tokenizer(student.pipeline, place)
    length, pad = tokenizer.model_max_length, tokenizer.pad_token_id
    return TokenizerSettings(file=TOKENIZER_FILES[place], length=length, pad=pad, masked=False, truncates=truncates)


def t5_tokens(student: Student, place: int = 0, masked: bool = False) -> TokenizerSettings:
    """A T5 tokeniser pads to the student's text length."""
    tokenizer = Family.tokenizer(student.pipeline, place)
    length, pad = student.description.text_length, tokenizer.pad_token_id
    return TokenizerSettings(file=TOKENIZER_FILES[place], length=length, pad=pad, masked=masked, truncates=False)


def pixart_call(student: Student, latents: Sequence[int]) -> Arguments:
    length = student.description.text_length
    return {"max_sequence_length": length, "use_resolution_binning": False, "clean_caption": False, **pixels(student, latents)}


def sd3_call(student: Student, latents: Sequence[int]) -> Arguments:
    return {"max_sequence_length": student.description.text_length, **pixels(student, latents)}


def cogvideox_call(student: Student, latents: Sequence[int]) -> Arguments:
    frames = {"num_frames": student.description.frames}
    return {"max_sequence_length": student.description.text_length, **frames, **pixels(student, latents)}


def pixels(student: Student, latents: Sequence[int]) -> Arguments:
    """The size that a pipeline must be asked for to end at latents of this shape; it knows of no pixel blocks."""
    pipeline = student.pipeline
    factor = getattr(pipeline, "vae_scale_factor", None) or pipeline.vae_scale_factor_spatial
    return {"height": latents[-2] * factor, "width": latents[-1] * factor}


def keep_first_dimension(step: StudentStep) -> StudentStep:
    """PixArt squeezes dimension 1 after proj_out, which acts on nothing in PyTorch but becomes an ONNX Squeeze that onnxruntime
    refuses; a dimension of one put in front of it makes both the same."""
    projection: Any = step.denoiser.network.proj_out
    if not projection._forward_hooks:
        projection.register_forward_hook(lambda module, inputs, output: output[:, None])
    return step


FAMILIES: dict[str, Family] = {
    "pixart": Family(
        text_encoder=lambda pipeline: MaskedT5(pipeline.text_encoder),
        conditions=("text_emb", "mask"),
        tokenizers=lambda student: [t5_tokens(student, masked=True)],
        latent_step=lambda transformer: transformer.config.patch_size,
        call=pixart_call,
        any_length=0,
        lowercase=True,
        step=keep_first_dimension,
    ),
    "stable_diffusion": Family(
        text_encoder=lambda pipeline: LastHidden(pipeline.text_encoder),
        conditions=("text_emb",),
        tokenizers=lambda student: [clip_tokens(student, 0)],
        latent_step=lambda unet: 2 ** (len(unet.config.block_out_channels) - 1),
        call=pixels,
    ),
    "sdxl": Family(
        text_encoder=lambda pipeline: SdxlTextEncoders(pipeline.text_encoder, pipeline.text_encoder_2),
        conditions=("text_emb", "pooled"),
        tokenizers=lambda student: [clip_tokens(student, 0), clip_tokens(student, 1)],
        latent_step=lambda unet: 2 ** (len(unet.config.block_out_channels) - 1),
        call=pixels,
    ),
    "sd3": Family(
        text_encoder=lambda pipeline: Sd3TextEncoders(pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3),
        conditions=("text_emb", "pooled"),
        tokenizers=lambda student: [clip_tokens(student, 0, True), clip_tokens(student, 1, True), t5_tokens(student, 2)],
        latent_step=lambda transformer: transformer.config.patch_size,
        call=sd3_call,
        any_length=2,
    ),
    "cogvideox": Family(
        text_encoder=lambda pipeline: LastHidden(pipeline.text_encoder),
        conditions=("text_emb",),
        tokenizers=lambda student: [t5_tokens(student)],
        latent_step=lambda transformer: transformer.config.patch_size,
        call=cogvideox_call,
    ),
}

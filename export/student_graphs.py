"""A student -> its three graphs: which of their dimensions vary, and random examples of their inputs."""

from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX

from export.decoders import ImageDecoder
from export.families import FAMILIES, Family
from export.graphs import Graph, StudentStep, Tensors
from export.video_decoders import ChunkDecoder, chunks_of
from server.engine.student import NEXT, TokenizerSettings, token_tensors
from tdm_train.checkpoint import Student
from tdm_train.denoiser import Denoiser

MAX_BATCH = 16
Shape = tuple[int, ...]
Dims = dict[int, Any]  # axis -> torch.export's dimension


def student_graphs(student: Student, vae: Any, shapes: list[Shape]) -> list[Graph]:
    """text_encoder, student_step and vae_decoder for latents of these shapes, decoded by `vae`; vae_decoder_next for videos of
    more than one chunk."""
    described, family = student.description, FAMILIES[student.description.family]
    sides = side_dims(family.latent_step(student.denoiser.network), shapes)
    nfe = described.nfe if described.k_conditioning else None
    step = step_graph(family, student.denoiser, condition_shapes(student), sides, nfe)
    decoders = chunk_graphs(vae, shapes[0]) if isinstance(vae, AutoencoderKLCogVideoX) else [decoder_graph(vae, sides)]
    return [text_graph(student), step, *decoders]


def example_shape(student: Student, shapes: list[Shape]) -> Shape:
    """The shape to trace with. At the network's own size its positions would be taken for constants of every size."""
    own = getattr(student.denoiser.network.config, "sample_size", None)
    odd = [shape for shape in shapes if shape[-2] != shape[-1]] or [shape for shape in shapes if shape[-1] != own]
    return (odd or shapes)[0]


def text_graph(student: Student) -> Graph:
    """All text encoders of a student as one graph."""
    family = FAMILIES[student.description.family]
    settings, module = family.tokenizers(student), family.text_encoder(student.pipeline)
    batch = batch_dim()
    dynamic: dict[str, Dims] = {}
    for place, told in enumerate(settings):
        length = {1: length_dim(told.length)} if place == family.any_length else {}
        dynamic |= {name: {0: batch, **length} for name in token_tensors(place, told)}

    def example(rows: int, latents: Shape) -> Tensors:
        generator = torch.Generator().manual_seed(rows)
        tensors: Tensors = {}
        for place, told in enumerate(settings):
            vocabulary = len(family.tokenizer(student.pipeline, place))
            tensors |= dict(zip(token_tensors(place, told), random_tokens(told, vocabulary, rows, generator), strict=False))
        return tensors

    outputs = tuple(name for name in family.conditions if name != "mask")
    return Graph("text_encoder", module, example, outputs, dynamic)


def random_tokens(
    told: TokenizerSettings, vocabulary: int, rows: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask), int64 [rows, L], padded from a random place on."""
    words = torch.randint(0, vocabulary, (rows, told.length), generator=generator)
    used = torch.randint(1, told.length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(told.length) < used).long()
    return torch.where(mask == 1, words, told.pad), mask


def step_graph(family: Family, denoiser: Denoiser, shapes: dict[str, Shape], sides: Dims, nfe: list[int] | None) -> Graph:
    """One NFE. shapes: of what the denoiser is told, without the batch; nfe: the counts that a steps-aware one knows."""

    def example(rows: int, latents: Shape) -> Tensors:
        generator = torch.Generator().manual_seed(rows)
        tensors = {
            "latents": torch.randn(rows, *latents, generator=generator),
            "x0_prev": torch.randn(rows, *latents, generator=generator),
            "timestep": torch.randint(1, denoiser.schedule.train_timesteps, (rows,), generator=generator).float(),
            "coefficients": torch.randn(rows, 3, generator=generator),
        }
        if nfe is not None:
            tensors["nfe"] = torch.tensor(nfe)[torch.randint(0, len(nfe), (rows,), generator=generator)]
        tensors |= {name: torch.randn(rows, *shapes[name], generator=generator) for name in family.conditions}
        if "mask" in tensors:
            used = torch.randint(1, shapes["mask"][0] + 1, (rows, 1), generator=generator)
            tensors["mask"] = (torch.arange(shapes["mask"][0]) < used).long()
        return tensors

    batch = batch_dim()
    dynamic: dict[str, Dims] = {name: {0: batch} for name in ("timestep", "coefficients", "nfe", *family.conditions)}
    dynamic["latents"] = dynamic["x0_prev"] = {0: batch, **sides}
    if family.any_length is not None:
        length = length_dim(shapes["text_emb"][0])
        dynamic |= {name: {0: batch, 1: length} for name in ("text_emb", "mask") if name in family.conditions}
    return Graph("student_step", family.step(StudentStep(denoiser)), example, ("next_latents", "x0"), dynamic)


def decoder_graph(vae: Any, sides: Dims) -> Graph:
    """The decoder of images, full or tiny."""

    def example(rows: int, latents: Shape) -> Tensors:
        return {"latents": torch.randn(rows, *latents, generator=torch.Generator().manual_seed(rows))}

    return Graph("vae_decoder", ImageDecoder(vae), example, ("image",), {"latents": {0: batch_dim(), **sides}})


def chunk_graphs(vae: AutoencoderKLCogVideoX, latents: Shape) -> list[Graph]:
    """The decoders of a video's first chunk and, if there are more, of the others. latents: the shape of all, [F, C, h, w]."""
    first, *later = chunks_of(vae, latents[0])
    module = ChunkDecoder(vae, followed=bool(later))

    def example(frames: int) -> Tensors:
        return {"latents": torch.randn(1, frames, *latents[1:], generator=torch.Generator().manual_seed(frames))}

    outputs = ("image", "next_state") if later else ("image",)
    graphs = [Graph("vae_decoder", module, lambda rows, shape: example(first), outputs, {})]
    if later:
        with torch.no_grad():
            _, state = module.eval()(**example(first))
        graphs.append(
            Graph(NEXT, ChunkDecoder(vae, module), lambda rows, shape: example(later[0]) | {"state": state}, outputs, {})
        )
    return graphs


def condition_shapes(student: Student) -> dict[str, Shape]:
    """Shapes without the batch of what student_step is told, by running the text encoders once."""
    graph = text_graph(student)
    tensors = graph.example(1, ())
    with torch.no_grad():
        outputs = graph.module.eval()(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    shapes = {name: tuple(output.shape[1:]) for name, output in zip(graph.outputs, outputs, strict=True)}
    return shapes | ({"mask": tuple(tensors["mask"].shape[1:])} if "mask" in tensors else {})


def batch_dim() -> Any:
    return torch.export.Dim("batch", min=1, max=MAX_BATCH)


def length_dim(longest: int) -> Any:
    return torch.export.Dim("length", min=2, max=longest)


def side_dims(step: int, shapes: list[Shape]) -> Dims:
    """The sides of latents, multiples of `step`, that differ between a student's sizes; none for a student of one size, which
    runs faster so."""
    dims: Dims = {}
    for axis, name in ((-2, "height"), (-1, "width")):
        low, high = min(shape[axis] for shape in shapes) // step, max(shape[axis] for shape in shapes) // step
        if low != high:
            dim = torch.export.Dim(name, min=low, max=high)
            dims[len(shapes[0]) + 1 + axis] = step * dim if step > 1 else dim
    return dims

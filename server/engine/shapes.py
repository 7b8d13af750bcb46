"""How large the inputs of a student's graphs get: what buffers are made for, and engines built for."""

from collections.abc import Mapping

from server.engine.student import GraphName, StudentManifest, token_tensors

# Taking turns, four decodes make room for sixteen rows of a 4-NFE ladder. Half of both bring 5 % fewer images/s, and 1-NFE
# requests a p99 that is a fifth lower: benchmarks/results/LOG.md.
NFE_BATCH, DECODE_BATCH = 16, 4
DYNAMIC = -1
Shape = tuple[int, ...]


def most_rows(graph: GraphName, manifest: StudentManifest) -> int:
    """The largest batch that the engine ever gives a graph: prompts are encoded one at a time."""
    return {
        "text_encoder": 1,
        "student_step": manifest.max_batch,
        "vae_decoder": 1 if manifest.chunks else min(DECODE_BATCH, manifest.max_batch),
        "vae_decoder_next": 1,
    }[graph]


def input_shapes(
    declared: Mapping[str, Shape], manifest: StudentManifest, size: str, batch: int, text: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Input name -> shape for a batch of one size ("WxH"): prompts are padded to their tokeniser's length.

    declared: the graph's own dimensions, with DYNAMIC for those that it leaves free; text: shapes [1, ...] of what the text
    encoder makes of a prompt, where the graph is told of it.
    """
    latents = tuple(manifest.sizes[size])
    rows: dict[str, Shape] = {"latents": latents, "x0_prev": latents}
    for place, tokenizer in enumerate(manifest.tokenizers):
        rows |= dict.fromkeys(token_tensors(place, tokenizer), (tokenizer.length,))
    rows |= {name: shape[1:] for name, shape in text.items()}
    if manifest.chunks and "x0_prev" not in declared:  # a decoder of videos: its graph states its chunk
        del rows["latents"]
    shapes = {name: (batch, *rows.get(name, dims[1:])) for name, dims in declared.items()}
    assert not any(DYNAMIC in shape for shape in shapes.values()), shapes
    return shapes

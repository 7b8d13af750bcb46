"""What it takes to export a denoiser at full size: seconds, peak memory, bytes, and how far ONNX is from eager.

Weights are random, so nothing is downloaded, and come from safetensors files that are mapped into memory, as a student's do.
Every stage is a process of its own, whose high-water mark of resident memory is the peak. Files mapped into it are included,
though the kernel can take those back at any time; a second number is without them.

The proof runs at small latents, where a step of billions of weights takes seconds on a CPU, and never holds eager's weights and
onnxruntime's together: eager float32 casts them layer by layer, and is gone before onnxruntime loads its own, which it copies.
"""

import gc
import importlib
import json
import math
import multiprocessing
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel, DDIMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from export.comparison import Check, compared
from export.families import FAMILIES
from export.graphs import Graph
from export.onnx import export_graph
from export.precision import DTYPES, known_precision
from export.publish import sha256
from export.student_graphs import side_dims, step_graph
from export.tensorrt import toolchain
from export.tensorrt_network import build_plan
from export.verify import eager
from server.engine.engine_plan import Recipe, ShapeRange
from server.engine.external_data import check_external_data
from server.engine.fingerprint import device_class
from server.engine.session import PROVIDER, session_options
from server.engine.student import Precision, map_file, weights_of
from server.table import readable_size
from tdm_train.backbones.cogvideox import CogVideoXDenoiser
from tdm_train.backbones.pixart import PixArtDenoiser
from tdm_train.backbones.sdxl import SDXLDenoiser
from tdm_train.denoiser import Denoiser
from tdm_train.samplers import schedule_of

SHARD_BYTES = 1 << 29
FILE = "student_step.onnx"
GOAL = 1.5  # peak of the export as a multiple of the weights
PROFILE = "profile.json"
MOST_ROWS, TARGET = 4, "8.9"  # of the engine
Measured = dict[str, Any]
Stage = Callable[..., Measured]


@dataclass(frozen=True)
class FullSize:
    """A published denoiser. network: makes it, with the configuration of its authors; latents: the shapes it is exported for
    and proven at, the first traced; conditions: shapes of what it is told."""

    family: str
    network: Callable[..., nn.Module]
    denoiser: Callable[..., Denoiser]
    latents: tuple[tuple[int, ...], ...]
    conditions: dict[str, tuple[int, ...]]


def sdxl_unet() -> nn.Module:
    """stabilityai/stable-diffusion-xl-base-1.0."""
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def pixart_transformer(**changes: int) -> nn.Module:
    """PixArt-alpha/PixArt-XL-2-1024-MS: the class's own configuration, over T5-XXL."""
    return PixArtTransformer2DModel(caption_channels=4096, **changes)


def cogvideox_transformer(**changes: int) -> nn.Module:
    """THUDM/CogVideoX-2b: the class's own configuration but for the size of its videos, which decides no weight: positions
    are made for one size, and at 49 frames of 480 x 720 pixels a step takes a CPU hours."""
    return CogVideoXTransformer3DModel(sample_width=24, sample_height=16, sample_frames=9, **changes)


IMAGES = ((4, 16, 24), (4, 24, 16))
FULL_SIZES = {
    "pixart-xl-2": FullSize("pixart", pixart_transformer, PixArtDenoiser, IMAGES, {"text_emb": (120, 4096), "mask": (120,)}),
    "sdxl-unet": FullSize("sdxl", sdxl_unet, SDXLDenoiser, IMAGES, {"text_emb": (77, 2048), "pooled": (1280,)}),
    "cogvideox-2b": FullSize(
        "cogvideox", cogvideox_transformer, CogVideoXDenoiser, ((3, 16, 16, 24),), {"text_emb": (226, 4096)}
    ),
}


def run(model: str, precision: str, layers: int | None, work: Path | None, tensorrt: bool) -> None:
    """Measures, prints the table, and one line of JSON last. Raises ValueError for an unknown model or precision, and where
    an engine is wanted and TensorRT for RTX is not there."""
    if model not in FULL_SIZES:
        raise ValueError(f"model {model!r}, legal: {', '.join(FULL_SIZES)}")
    if known_precision(precision) == "bf16":
        raise ValueError("precision 'bf16' cannot be proven at full size: onnxruntime computes none on CPU; legal: fp32, fp16")
    if layers is not None and model == "sdxl-unet":
        raise ValueError(f"layers={layers}: the layers of sdxl-unet are in its blocks, legal for it: none")
    wanted: list[Stage] = [make_weights, export, prove]
    if tensorrt:
        toolchain("rtx", TARGET)
        wanted.append(build_engine)
    with tempfile.TemporaryDirectory(dir=work, prefix="fewstep-bench-") as folder:
        arguments = (model, known_precision(precision), layers, Path(folder))
        stages = {stage.__name__: alone(stage, *arguments) for stage in wanted}
    report(model, precision, layers, stages)


def alone(stage: Stage, *arguments: Any) -> Measured:
    """Runs a stage in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, stage, *arguments).result()


def measured(stage: Stage, *arguments: Any) -> Measured:
    """What a stage found, with its seconds and bytes."""
    imported, begin = memory("VmHWM"), time.perf_counter()
    with own_peak() as peaks:
        found = stage(*arguments)
    seconds = round(time.perf_counter() - begin, 1)
    told = {"seconds": seconds, "peak_bytes": memory("VmHWM"), "peak_own_bytes": max(peaks), "import_bytes": imported}
    return told | found


def memory(name: str) -> int:
    """Resident bytes of this process: VmHWM, the most there were; RssAnon, those now that no file can give back."""
    (kibibytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kibibytes)


@contextmanager
def own_peak() -> Iterator[list[int]]:
    """Collects RssAnon every 20 ms while the block runs: the kernel keeps no mark of it."""
    seen, ended = [memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            seen.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


# --- stages, each in a process of its own -------------------------------------------------------------------------------------


def make_weights(model: str, precision: Precision, layers: int | None, folder: Path) -> Measured:
    """Writes random weights that keep the scale of what passes through, as safetensors files."""
    network, generator = empty_network(model, layers), torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    count = parameters = 0
    for name, weight in network.named_parameters():
        shard[name] = random_weight(weight.shape, generator).to(DTYPES[precision])
        parameters += weight.numel()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            save_file(shard, folder / f"{count}.safetensors")
            shard, count = {}, count + 1
    save_file(shard, folder / f"{count}.safetensors")
    return {"parameters": parameters, "bytes": parameters * DTYPES[precision].itemsize}


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Normal with a variance of 1 / fan-in; vectors, which are biases and scales of norms, around 0 and 1 alike."""
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
    return torch.randn(shape, generator=generator).div_(math.sqrt(fan_in))


def export(model: str, precision: Precision, layers: int | None, folder: Path) -> Measured:
    """Writes the graph of one NFE."""
    graph = denoiser_graph(model, precision, layers, folder)
    export_graph(graph, folder / FILE, FULL_SIZES[model].latents[0])
    weights = folder / weights_of(FILE)
    sizes = {"graph_bytes": (folder / FILE).stat().st_size, "weights_bytes": weights.stat().st_size if weights.exists() else 0}
    (folder / PROFILE).write_text(json.dumps(profile(graph, FULL_SIZES[model].latents)))
    return sizes


def profile(graph: Graph, latents: tuple[tuple[int, ...], ...]) -> dict[str, dict[str, list[int]]]:
    """The least, the usual and the largest shape of every input."""
    every = [graph.example(batch, shape) for shape in latents for batch in (1, MOST_ROWS)]
    told: dict[str, dict[str, list[int]]] = {}
    for name in every[0]:
        sides = list(zip(*(example[name].shape for example in every), strict=True))
        least, most = [min(side) for side in sides], [max(side) for side in sides]
        told[name] = {"min": least, "opt": list(every[0][name].shape), "max": most}
    return told


def build_engine(model: str, precision: Precision, layers: int | None, folder: Path) -> Measured:
    """The graph as an engine of TensorRT for RTX, for one kind of GPU; it is built and not run."""
    tools = toolchain("rtx", TARGET)
    shapes = {name: ShapeRange.model_validate(told) for name, told in json.loads((folder / PROFILE).read_text()).items()}
    digest = sha256(folder / FILE)
    made = dict(graph="student_step", onnx_sha256=digest, package=tools.package, version=tools.version, targets=tools.targets)
    recipe = Recipe.model_validate(made | {"profile": shapes})
    contents = onnx.load(folder / FILE, load_external_data=False)
    plan, computes = build_plan(importlib.import_module(tools.package), recipe, contents, folder / FILE)
    return {"plan_bytes": len(plan), "computes_in": computes, "package": f"{tools.package} {tools.version}", "target": TARGET}


def prove(model: str, precision: Precision, layers: int | None, folder: Path) -> Measured:
    """Compares the written graph with eager float32 over the same weights, at a batch of one."""
    latents = FULL_SIZES[model].latents
    inputs, expected = eager_outputs(model, precision, layers, folder)
    gc.collect()
    session = frugal_session(folder)
    checks: list[Check] = []
    for shape, given, theirs in zip(latents, inputs, expected, strict=True):
        ours = session.run(["next_latents", "x0"], {name: tensor.numpy() for name, tensor in given.items()})
        checks.append(compared(f"latents {' x '.join(map(str, shape))}", ours, theirs, "student_step", precision, "float32"))
    worst = {"largest_error": max(check.error for check in checks), "mean_error": max(check.mean for check in checks)}
    return {**worst, "tolerance": checks[0].tolerance, "passed": all(check.passed for check in checks)}


def frugal_session(folder: Path) -> ort.InferenceSession:
    """The graph on onnxruntime without what costs memory: a server's session keeps float32 weights too, folded and repacked."""
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.use_per_session_threads = True
    graph, weights = (folder / FILE).read_bytes(), folder / weights_of(FILE)
    if weights.exists():
        contents = map_file(weights)
        check_external_data(FILE, graph, weights.name, len(contents))
        options.add_external_initializers_from_files_in_memory([weights.name], [contents], [len(contents)])
    return ort.InferenceSession(graph, options, providers=[PROVIDER])


def eager_outputs(model: str, precision: Precision, layers: int | None, folder: Path) -> tuple[list[Any], list[Any]]:
    """Inputs and eager float32 outputs at every latent shape."""
    graph = denoiser_graph(model, precision, layers, folder)
    inputs = [graph.example(1, shape) for shape in FULL_SIZES[model].latents]
    with float32_layer_by_layer(graph.module):
        return inputs, [eager(graph.module, given) for given in inputs]


# --- a full-size denoiser that takes no memory of its own ---------------------------------------------------------------------


def empty_network(model: str, layers: int | None) -> nn.Module:
    """The network without memory for its weights; buffers are there."""
    with init_empty_weights():
        return FULL_SIZES[model].network(**({} if layers is None else {"num_layers": layers}))


def denoiser_graph(model: str, precision: Precision, layers: int | None, folder: Path) -> Graph:
    """One NFE of the denoiser over weights that stay in their files until they are looked at."""
    size, network = FULL_SIZES[model], empty_network(model, layers)
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    network.load_state_dict(weights, strict=False, assign=True)
    network.to(DTYPES[precision])  # the buffers
    denoiser = size.denoiser(network.eval().requires_grad_(False), schedule_of(DDIMScheduler()))
    family = FAMILIES[size.family]
    sides = side_dims(family.latent_step(network), list(size.latents))
    return step_graph(family, denoiser, size.conditions, sides, None)


@contextmanager
def float32_layer_by_layer(module: nn.Module) -> Iterator[None]:
    """While the block runs, every layer computes in float32 over its own weights, which are cast for that moment alone.

    The first weight is cast for all of the block: by it a denoiser knows in which precision to begin.
    """
    first = next(module.parameters())
    half = first.data

    def enter(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        layer.half_weights = dict(layer._parameters)
        for name, weight in layer.half_weights.items():
            if weight is not None:
                layer._parameters[name] = nn.Parameter(weight.float(), requires_grad=False)
        return tuple(one.float() if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in inputs)

    def leave(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        layer._parameters.update(layer.half_weights)
        del layer.half_weights

    layers = [layer for layer in module.modules() if layer._parameters and not list(layer.children())]
    handles = [
        handle for layer in layers for handle in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))
    ]
    first.data = half.float()
    try:
        yield
    finally:
        first.data = half
        for handle in handles:
            handle.remove()


def report(model: str, precision: str, layers: int | None, stages: dict[str, Measured]) -> None:
    """A line per stage for people, then the document."""
    weights = stages["make_weights"]["bytes"]
    share, own = (stages["export"][peak] / weights for peak in ("peak_bytes", "peak_own_bytes"))
    print(f"{model} in {precision}: {stages['make_weights']['parameters'] / 1e9:.2f} billion weights, {readable_size(weights)}")
    for name in list(stages)[1:]:
        peaks = [readable_size(stages[name][peak]) for peak in ("peak_bytes", "peak_own_bytes")]
        print(f"{name:<14}{stages[name]['seconds']:>8.1f} s, peak {peaks[0]}, without mapped files {peaks[1]}")
    print(f"peak of the export: {share:.2f} of the weights (goal: {GOAL}), {own:.2f} without mapped files")
    if "build_engine" in stages:
        built = stages["build_engine"]
        print(
            f"engine of {built['package']} for {built['target']}: {readable_size(built['plan_bytes'])}, {built['computes_in']}"
        )
    proof = stages["prove"]
    print(f"against eager float32: {proof['largest_error']:.2g}, at most {proof['tolerance']:.2g}")
    document: Measured = {"benchmark": "export", "model": model, "precision": precision, "layers": layers}
    document |= {"device": device_class(), "torch": torch.__version__, "latents": FULL_SIZES[model].latents}
    document |= {"peak_over_weights": round(share, 3), "own_peak_over_weights": round(own, 3), "goal": GOAL}
    print(json.dumps(document | stages))

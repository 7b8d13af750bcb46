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
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch

from benchmarks.alone import Measured, Stage, alone
from benchmarks.full_size import FULL_SIZES, denoiser_graph, float32_layer_by_layer, make_weights
from export.comparison import Check, compared
from export.graphs import Graph
from export.onnx import export_graph
from export.precision import known_precision
from export.publish import sha256
from export.tensorrt import toolchain
from export.tensorrt_network import build_plan
from export.verify import eager
from server.engine.engine_plan import Recipe, ShapeRange
from server.engine.external_data import check_external_data
from server.engine.fingerprint import device_class
from server.engine.session import PROVIDER, session_options
from server.engine.student import Precision, map_file, weights_of
from server.table import readable_size

FILE = "student_step.onnx"
GOAL = 1.5  # peak of the export as a multiple of the weights
PROFILE = "profile.json"
MOST_ROWS, TARGET = 4, "8.9"  # of the engine


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

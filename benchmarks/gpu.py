"""A student on the GPU at hand against the processor's pixels and against the floor of the hardware.

The floor of an NFE is the larger of two times: its floating-point operations at the rate of a large matrix product, and its
weights at the rate of a large copy. Both rates are measured here, by torch, in the same run; without torch on CUDA there is no
floor to tell. NFEs are timed around Engine.step, which waits for the GPU, so everything that a request waits for is in them.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tqdm import tqdm

from benchmarks.flops import matrix_flops
from benchmarks.nfe import PROMPTS, law, measure
from export.onnx_shapes import declared
from server.engine.engine import Engine
from server.engine.provider import Provider
from server.engine.request import Request
from server.engine.shapes import input_shapes
from server.engine.student import open_verified
from server.generate import student_folder

WARM_UPS, SIDE, PAIRS = 3, 8192, 8
BATCHES = (1, 2, 4, 8, 16)
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
Peaks = dict[str, float]


def run(repository: Path, student: str | None, provider: str, runs: int) -> None:
    """Measures, prints the table, and one line of JSON last. Raises ValueError, or EngineError where there is no GPU."""
    providers: dict[str, Provider] = {"cuda": "cuda", "tensorrt": "tensorrt"}
    if provider not in providers:
        raise ValueError(f"--provider {provider!r}: legal are {', '.join(providers)}")
    folder = student_folder(repository, student)
    engine = Engine.open(folder, "fast", providers[provider])
    document = {"benchmark": "gpu", "student": engine.manifest.name, "fingerprint": engine.fingerprint}
    document |= {"parts": engine.fingerprint_parts, "runs": runs, "unit": "ms"}
    rates = peaks(engine.manifest.precision["student_step"])
    document |= measured(engine, Engine.open(folder, provider="cpu"), folder, runs, rates)
    print_table(document)
    print(json.dumps(document))


def measured(engine: Engine, processor: Engine, folder: Path, runs: int, rates: Peaks | None) -> dict[str, Any]:
    """Parity, the law over NFE counts, and each batch beside its floor."""
    samples = measure(engine, runs)
    batches = [batch for batch in BATCHES if batch <= engine.max_batch]
    return {
        "parity": parity(engine, processor),
        "law": law({nfe: np.array(stages["total"]) for nfe, stages in samples.items()}),
        "peaks": rates,
        "nfe": {str(batch): nfe_of(engine, batch, runs) | floor(engine, folder, batch, rates) for batch in batches},
    }


def parity(engine: Engine, processor: Engine) -> dict[str, Any]:
    """Over every NFE count: how far latents and colours are apart, and whether the same request has the same bits again."""
    errors, levels, repeats = [], [], True
    for number in range(PAIRS):
        for nfe in engine.manifest.nfe:
            asked = Request(PROMPTS[number % len(PROMPTS)], number, 0, nfe, next(iter(engine.manifest.sizes)))
            (ours, image), (theirs, reference) = finished(engine, asked), finished(processor, asked)
            errors.append(np.abs(ours - theirs))
            levels.append(np.abs(image.astype(np.int16) - reference))
            repeats &= np.array_equal(image, engine.run(asked).image)
    return {
        "latents_largest": float(np.max([error.max() for error in errors])),
        "latents_mean": float(np.mean([error.mean() for error in errors])),
        "levels_largest": int(np.max([level.max() for level in levels])),
        "pixels_that_differ": float(np.mean([level.any(-1).mean() for level in levels])),
        "same_bits_again": bool(repeats),
    }


def finished(engine: Engine, asked: Request) -> tuple[Any, Any]:
    """The last latents of a request alone, and its picture."""
    progress = engine.prepare(asked)
    while progress.remaining:
        if error := engine.step([progress])[0]:
            raise error
    return progress.latents, engine.decode(asked.size, [progress.latents])[0]


def nfe_of(engine: Engine, batch: int, runs: int) -> dict[str, float]:
    """Milliseconds of an NFE that finds its requests' latents on the device and leaves them there."""
    longest, size = max(engine.manifest.nfe), next(iter(engine.manifest.sizes))
    spent: list[float] = []
    for number in tqdm(range(WARM_UPS + runs), desc=f"NFEs of {batch}", dynamic_ncols=True):
        members = [engine.prepare(Request(PROMPTS[0], number * batch + row, 0, longest, size)) for row in range(batch)]
        for step in range(longest):
            begin = time.perf_counter()
            engine.step(members)
            if number >= WARM_UPS and (0 < step < longest - 1 or longest < 3):
                spent.append(1000 * (time.perf_counter() - begin))
    return {"median": round(float(np.median(spent)), 4), "p95": round(float(np.percentile(spent, 95)), 4)}


def floor(engine: Engine, folder: Path, batch: int, rates: Peaks | None) -> dict[str, Any]:
    """What the hardware allows for a batch: {"tflop", "floor"}; floor in milliseconds, None where no rates are known."""
    manifest, path = engine.manifest, folder / "1" / "student_step.onnx"
    contents = bytes(open_verified(path, manifest.files[path.name]))
    model = onnx.load_model_from_string(contents)
    text = {name: array.shape for name, array in engine.text_encoder.encode(PROMPTS[0]).conditions.items()}
    flops = matrix_flops(model, input_shapes(declared(model), manifest, next(iter(manifest.sizes)), batch, text))
    told = {"tflop": flops / 1e12, "floor": None}
    if rates:
        told["floor"] = 1000 * max(flops / rates["flops"], len(contents) / rates["bytes"])
    return told


def peaks(precision: str) -> Peaks | None:
    """The GPU's rates in floating-point operations and bytes per second, by a large matrix product and a large copy."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    one, two = (torch.randn(SIDE, SIDE, device="cuda").to(getattr(torch, DTYPES[precision])) for _ in range(2))
    target = torch.empty_like(one)
    product = seconds(lambda: torch.matmul(one, two, out=target), torch.cuda.synchronize)
    copy = seconds(lambda: target.copy_(one), torch.cuda.synchronize)
    return {"flops": 2 * SIDE**3 / product, "bytes": 2 * one.nbytes / copy}


def seconds(work: Callable[[], Any], wait: Callable[[], None], times: int = 10) -> float:
    """Mean seconds of a piece of GPU work, after a warm-up."""
    for _ in range(WARM_UPS):
        work()
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - begin) / times


def print_table(document: dict[str, Any]) -> None:
    """For people; the JSON line that follows is for machines."""
    found, parts = document["parity"], document["parts"]
    again = "the same bits" if found["same_bits_again"] else "OTHER BITS"
    print(f"{document['student']} by {parts['provider']} on {parts['device']}, {document['runs']} runs")
    print(f"latents: at most {found['latents_largest']:.2g} from the processor's, {found['latents_mean']:.2g} in the mean")
    print(f"colours: at most {found['levels_largest']} of 255; the same request again has {again}")
    print(f"T(n) = a + b n: a = {document['law']['a']:.3f} ms, b = {document['law']['b']:.3f} ms")
    print(f"{'rows':<6}{'ms per NFE':>12}{'p95':>10}{'floor':>10}{'of it':>8}")
    for batch, row in document["nfe"].items():
        known = row["floor"] is not None
        told = f"{row['floor']:>10.3f}{row['floor'] / row['median']:>8.0%}" if known else f"{'unknown':>10}"
        print(f"{batch:<6}{row['median']:>12.3f}{row['p95']:>10.3f}{told}")

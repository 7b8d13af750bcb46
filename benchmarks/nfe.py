"""What one more NFE costs: milliseconds of every stage in process, and the law T(n) = a + b n.

a is what a picture or a video costs whatever its NFE count (text encoder, decoder, file); b is one denoiser evaluation. Runs
are interleaved over n, so that a machine that slows down for a while slows all n alike; medians and a bootstrap over runs
keep single hiccups out. Every run has its own prompt and seed, so that no cache can answer.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from server.engine.engine import Engine
from server.engine.fingerprint import device_class
from server.engine.request import Request
from server.engine.session import cpu_threads
from server.gateway.media import encode_now
from server.gateway.video_media import write_video
from server.generate import open_engine

PROMPTS = (
    "a red circle above a blue square",
    "a large yellow star on a purple background",
    "a small green ring beside an orange cross",
    "a white triangle in the top left",
)
WARM_UPS = 3
RESAMPLES = 1000
Samples = dict[int, dict[str, list[float]]]


def run(repository: Path, student: str | None, runs: int) -> None:
    """Measures, prints the table, and one line of JSON last. Raises EngineError."""
    engine = open_engine(repository, student)
    samples = measure(engine, runs)
    document = describe(engine, samples, runs)
    print_table(document)
    print(json.dumps(document))


def measure(engine: Engine, runs: int) -> Samples:
    """NFE count -> stage -> milliseconds of every run, "total" among the stages."""
    counts = engine.manifest.nfe
    samples: Samples = {nfe: {} for nfe in counts}
    for index in tqdm(range(-WARM_UPS, runs), desc="runs", dynamic_ncols=True):
        for nfe in counts:
            for stage, milliseconds in one_run(engine, nfe, index + WARM_UPS).items():
                if index >= 0:
                    samples[nfe].setdefault(stage, []).append(milliseconds)
    return samples


def one_run(engine: Engine, nfe: int, seed: int) -> dict[str, float]:
    """Milliseconds of every stage of one picture or video, its file among them, and their sum."""
    result = engine.run(
        Request(f"{PROMPTS[seed % len(PROMPTS)]} {seed} {nfe}", seed, 0, nfe, next(iter(engine.manifest.sizes)))
    )
    begin = time.perf_counter_ns()
    if engine.manifest.fps is None:
        written = {"image_encode": encode_now(result.image, "png").nanoseconds}
    else:
        write_video(result.image, engine.manifest.fps, "mp4")
        written = {"video_encode": time.perf_counter_ns() - begin}
    milliseconds = {stage: nanoseconds / 1e6 for stage, nanoseconds in (result.nanoseconds | written).items()}
    return milliseconds | {"total": sum(milliseconds.values())}


def describe(engine: Engine, samples: Samples, runs: int) -> dict[str, Any]:
    """The benchmark's document: identity, stages, totals, law, raw totals."""
    totals = {nfe: np.array(stages["total"]) for nfe, stages in samples.items()}
    return {
        "benchmark": "nfe",
        "student": engine.manifest.name,
        "fingerprint": engine.fingerprint,
        "device": device_class(),
        "threads": cpu_threads(),
        "size": next(iter(engine.manifest.sizes)),
        "runs": runs,
        "unit": "ms",
        "stages": {stage: summary(values) for stage, values in pooled(samples).items()},
        "totals": {str(nfe): summary(values) for nfe, values in totals.items()},
        "law": law(totals),
        "samples": {str(nfe): [round(value, 4) for value in values] for nfe, values in totals.items()},
    }


def pooled(samples: Samples) -> dict[str, list[float]]:
    """Stage -> milliseconds over all NFE counts, in the order of execution; "total" is left out."""
    longest = samples[max(samples)]
    return {stage: [ms for stages in samples.values() for ms in stages.get(stage, [])] for stage in longest if stage != "total"}


def summary(values: "list[float] | npt.NDArray[np.float64]") -> dict[str, float]:
    return {"median": round(float(np.median(values)), 4), "p95": round(float(np.percentile(values, 95)), 4)}


def law(totals: dict[int, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """a and b of T(n) = a + b n through the medians, 95 % bootstrap intervals over runs, and the worst lack of fit."""
    counts = np.array(sorted(totals))
    runs = np.stack([totals[int(nfe)] for nfe in counts], axis=1)  # [runs, counts]
    rng = np.random.default_rng(0)
    resampled = [fit(counts, runs[rng.integers(len(runs), size=len(runs))]) for _ in range(RESAMPLES)]
    (a, b), (low, high) = fit(counts, runs), np.percentile(resampled, [2.5, 97.5], axis=0)
    misfit = np.abs(np.median(runs, axis=0) - (a + b * counts)).max()
    interval = [[round(float(low[i]), 4), round(float(high[i]), 4)] for i in range(2)]
    return {"a": round(a, 4), "a_ci95": interval[0], "b": round(b, 4), "b_ci95": interval[1], "misfit": round(float(misfit), 4)}


def fit(counts: npt.NDArray[Any], runs: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Least squares through the medians of runs [runs, counts] -> (a, b)."""
    b, a = np.polyfit(counts, np.median(runs, axis=0), 1)
    return float(a), float(b)


def print_table(document: dict[str, Any]) -> None:
    """For people; the JSON line that follows is for machines."""
    print(f"{document['student']} {document['size']}, {document['runs']} runs per NFE count, ", end="")
    print(f"{document['threads']} thread(s), {document['device']}")
    print(f"{'stage':<16}{'median ms':>12}{'p95 ms':>12}")
    rows = document["stages"] | {f"T({nfe})": values for nfe, values in document["totals"].items()}
    for name, values in rows.items():
        print(f"{name:<16}{values['median']:>12.3f}{values['p95']:>12.3f}")
    found = document["law"]
    intercept, slope = ("{:.3f} ms [{:.3f}, {:.3f}]".format(found[name], *found[f"{name}_ci95"]) for name in "ab")
    print(f"T(n) = a + b n: a = {intercept}, b = {slope}; worst distance of a median from the line {found['misfit']:.3f} ms")

"""How the three graphs are best run on this machine: threads and batches, milliseconds per row, and whether bits change.

Calls of all variants are interleaved, so that a machine that slows down for a while slows all alike. The engine's THREADS
and DECODE_BATCH are chosen by this table.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from server.engine.engine import Engine, Request
from server.engine.fingerprint import device_class
from server.engine.session import OnnxSession, Tensors
from server.engine.student import open_student
from server.generate import student_folder

THREADS = (1, 2)
BATCHES = (1, 2, 4, 8, 16)
GRAPHS = ("student_step", "vae_decoder")
Variant = tuple[str, int, int]  # graph, threads, batch


def run(repository: Path, student: str | None, rounds: int) -> None:
    """Measures, prints the table, and one line of JSON last. Raises EngineError."""
    exported = open_student(student_folder(repository, student))
    engine = Engine.of(exported)
    sessions = {
        (graph, threads): OnnxSession(graph, exported.files[f"{graph}.onnx"], threads)
        for graph in GRAPHS
        for threads in THREADS
    }
    tensors = {(graph, batch): inputs(engine, graph, batch) for graph in GRAPHS for batch in BATCHES}
    variants = [(graph, threads, batch) for graph in GRAPHS for threads in THREADS for batch in BATCHES]
    same = all(same_bits(sessions, tensors, graph, batch) for graph in GRAPHS for batch in BATCHES)
    spent: dict[Variant, list[float]] = {variant: [] for variant in variants}
    for _ in tqdm(range(rounds), desc="rounds", dynamic_ncols=True):
        for graph, threads, batch in variants:
            begin = time.perf_counter()
            sessions[graph, threads].run(tensors[graph, batch])
            spent[graph, threads, batch].append(1000 * (time.perf_counter() - begin) / batch)
    report(engine, spent, same, rounds)


def inputs(engine: Engine, graph: str, batch: int) -> Tensors:
    """What the engine gives a graph for the first NFE of a batch of requests."""
    size, nfe = next(iter(engine.manifest.sizes)), max(engine.manifest.nfe)
    rows = [engine.prepare(Request(f"a red circle {row}", row, 0, nfe, size)) for row in range(batch)]
    latents = np.concatenate([row.latents for row in rows])
    if graph == "vae_decoder":
        return {"latents": latents}
    table = np.stack([row.table[0] for row in rows])
    return {
        "latents": latents,
        "x0_prev": np.zeros_like(latents),
        "timestep": np.ascontiguousarray(table[:, 0]),
        "coefficients": np.ascontiguousarray(table[:, 1:]),
        "nfe": np.full(batch, nfe, np.int64),
        "text_emb": np.concatenate([row.text.emb for row in rows]),
        "mask": np.concatenate([row.text.mask for row in rows]),
    }


def same_bits(
    sessions: dict[tuple[str, int], OnnxSession], tensors: dict[tuple[str, int], Tensors], graph: str, batch: int
) -> bool:
    """Whether every thread count gives the same bits."""
    outputs = [[output.tobytes() for output in sessions[graph, threads].run(tensors[graph, batch])] for threads in THREADS]
    return all(other == outputs[0] for other in outputs)


def report(engine: Engine, spent: dict[Variant, list[float]], same: bool, rounds: int) -> None:
    """Medians per row for people, then the document."""
    median = {variant: float(np.median(values)) for variant, values in spent.items()}
    print(f"{'ms per row, batch':<28}" + "".join(f"{batch:>9}" for batch in BATCHES))
    for graph in GRAPHS:
        for threads in THREADS:
            shown = "".join(f"{median[graph, threads, batch]:>9.3f}" for batch in BATCHES)
            print(f"{f'{graph}, {threads} thread(s)':<28}{shown}")
    print(f"bits equal across thread counts: {'yes' if same else 'NO'}")
    document: dict[str, Any] = {"benchmark": "sessions", "student": engine.manifest.name, "fingerprint": engine.fingerprint}
    document |= {"device": device_class(), "rounds": rounds, "unit": "ms per row", "bits_equal_across_threads": same}
    document["median"] = {
        f"{graph}, {threads} threads, batch {batch}": round(value, 4) for (graph, threads, batch), value in median.items()
    }
    print(json.dumps(document))

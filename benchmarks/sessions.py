"""How the three graphs are best run on this machine: threads and batches, milliseconds per row, and whether bits change.

A process has one pool of threads, so each thread count has a process of its own; their calls are interleaved, so that a
machine that slows down for a while slows all alike. The engine's NFE_BATCH, DECODE_BATCH and cpu_threads are chosen by this.
"""

import hashlib
import json
import multiprocessing
import os
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from server.engine.engine import Engine
from server.engine.fingerprint import device_class
from server.engine.request import Request
from server.engine.session import THREADS_VARIABLE, Tensors
from server.generate import open_engine

THREADS = (1, 2)
BATCHES = (1, 2, 4, 8, 16)
GRAPHS = ("student_step", "vae_decoder")
CALLS = 4  # one after the other, as a request has them
Variant = tuple[str, int, int]  # graph, threads, batch


def run(repository: Path, student: str | None, rounds: int) -> None:
    """Measures, prints the table, and one line of JSON last. Raises EngineError."""
    engine = open_engine(repository, student)
    spent: dict[Variant, list[float]] = {
        (graph, threads, batch): [] for graph in GRAPHS for threads in THREADS for batch in BATCHES
    }
    digests: dict[tuple[str, int], set[str]] = {(graph, batch): set() for graph in GRAPHS for batch in BATCHES}
    with ExitStack() as stack:
        workers = {threads: stack.enter_context(Worker(repository, student, threads)) for threads in THREADS}
        for _ in tqdm(range(rounds), desc="rounds", dynamic_ncols=True):
            for graph, threads, batch in spent:
                milliseconds, digest = workers[threads].call(graph, batch)
                spent[graph, threads, batch].append(milliseconds / batch)
                digests[graph, batch].add(digest)
    report(engine, spent, all(len(found) == 1 for found in digests.values()), rounds)


class Worker:
    """A process that has so many threads and runs what it is told."""

    def __init__(self, repository: Path, student: str | None, threads: int) -> None:
        self.ours, theirs = multiprocessing.Pipe()
        arguments = (theirs, repository, student, threads)
        self.process = multiprocessing.get_context("spawn").Process(target=obey, args=arguments, daemon=True)

    def __enter__(self) -> "Worker":
        self.process.start()
        return self

    def call(self, graph: str, batch: int) -> tuple[float, str]:
        """Milliseconds of a call, and a digest of what came out."""
        self.ours.send((graph, batch))
        answer: tuple[float, str] = self.ours.recv()
        return answer

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()


def obey(told: Connection, repository: Path, student: str | None, threads: int) -> None:
    """The worker's side: runs a graph CALLS times and tells the mean, for as long as it is asked."""
    os.environ[THREADS_VARIABLE] = str(threads)
    engine = open_engine(repository, student)
    tensors = {(graph, batch): inputs(engine, graph, batch) for graph in GRAPHS for batch in BATCHES}
    while True:
        graph, batch = told.recv()
        begin = time.perf_counter()
        for _ in range(CALLS):
            outputs = engine.sessions[graph].run(tensors[graph, batch])
        spent = 1000 * (time.perf_counter() - begin) / CALLS
        told.send((spent, hashlib.sha256(b"".join(output.tobytes() for output in outputs)).hexdigest()))


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
        **({"nfe": np.full(batch, nfe, np.int64)} if engine.manifest.k_conditioning else {}),
        **{name: np.concatenate([row.text.conditions[name] for row in rows]) for name in engine.manifest.conditions},
    }


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
    document["median"] = {f"{graph}, {threads}, {batch}": round(value, 4) for (graph, threads, batch), value in median.items()}
    document["median_keys"] = "graph, threads, batch"
    print(json.dumps(document))

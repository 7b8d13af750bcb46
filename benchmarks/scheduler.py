"""What the NFE scheduler costs and what it gains, in one interleaved run on this machine.

- overhead: one image through the scheduler against the bare sum of its session calls;
- throughput: closed loops of 1 to 16 clients against the best static batch;
- mix: the p99 of 1-NFE requests among 4-NFE ones, against whole-request batching in order of arrival, with the same Poisson
  arrivals at the same share of capacity, counted from the intended arrival.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from server.engine.device import FreeDevice
from server.engine.engine import Engine
from server.engine.errors import EngineError
from server.engine.fingerprint import device_class
from server.engine.request import Pixels, Progress, Request, Result
from server.engine.scheduler import Scheduler
from server.generate import open_engine

CLIENTS = (1, 2, 4, 8, 16)
SHORT_SHARE = 0.2  # of the mix's requests ask for the smallest NFE count, the others for the largest
LOAD = 0.7


@dataclass
class Waiter:
    """A sink that calls `then` with the time of the last word."""

    then: Callable[[float], None]

    def cancelled(self) -> bool:
        return False

    def stepped(self, step: int) -> None: ...

    def preview(self, step: int, image: Pixels) -> None: ...

    def done(self, result: Result) -> None:
        self.then(time.perf_counter())

    def failed(self, error: EngineError) -> None:
        raise error


class Bench:
    """One student, unique prompts and seeds, so that no cache answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.number = engine, 0
        self.wide = replace(engine, nfe_batch=engine.manifest.max_batch, buffers={})  # static batches may be larger than ours
        self.size = next(iter(engine.manifest.sizes))
        self.short, self.long = min(engine.manifest.nfe), max(engine.manifest.nfe)

    def request(self, nfe: int) -> Request:
        self.number += 1
        return Request(f"a red circle above a blue square {self.number}", self.number, 0, nfe, self.size)

    def scheduled(self, nfe: int) -> float:
        """Seconds of one image through a running scheduler, the hand-over between threads included."""
        if not hasattr(self, "scheduler"):
            self.scheduler = Scheduler(self.engine, FreeDevice())
            self.scheduler.start()
        answered = threading.Event()
        begin = time.perf_counter()
        self.scheduler.submit(self.request(nfe), Waiter(lambda _: answered.set()))
        answered.wait()
        return time.perf_counter() - begin

    def bare(self, nfe: int) -> float:
        """Seconds of the same session calls and nothing else."""
        spent: list[float] = []
        sessions = dict(self.engine.sessions)

        def timed(name: str) -> Any:
            class Timed:
                batch_invariant = True

                def run(self, tensors: dict[str, Any]) -> Any:
                    begin = time.perf_counter()
                    outputs = sessions[name].run(tensors)
                    spent.append(time.perf_counter() - begin)
                    return outputs

            return Timed()

        for name in sessions:
            self.engine.sessions[name] = timed(name)
        self.engine.text_encoder.session = self.engine.sessions["text_encoder"]
        self.engine.run(self.request(nfe))
        self.engine.sessions.update(sessions)
        self.engine.text_encoder.session = sessions["text_encoder"]
        return sum(spent)

    def static(self, batch: int, seconds: float) -> float:
        """Images per second of whole batches one after the other, largest NFE count."""
        begin, images = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < seconds:
            self.whole([self.engine.prepare(self.request(self.long)) for _ in range(batch)])
            images += batch
        return images / elapsed

    def whole(self, batch: list[Progress]) -> None:
        """A batch from its first NFE to its last decode; who needs fewer NFEs waits for the others."""
        while to_step := [member for member in batch if member.remaining]:
            self.wide.step(to_step)
        for first in range(0, len(batch), self.engine.max_decode_batch):
            part = batch[first : first + self.engine.max_decode_batch]
            self.engine.decode(self.size, [member.latents for member in part])

    def closed_loop(self, clients: int, seconds: float) -> float:
        """Images per second of clients that ask again as soon as they are answered."""
        scheduler = Scheduler(self.engine, FreeDevice())
        begin, done = time.perf_counter(), 0

        def again(now: float) -> None:
            nonlocal done
            done += 1
            if now - begin < seconds:
                scheduler.submit(self.request(self.long), Waiter(again))

        for _ in range(clients):
            scheduler.submit(self.request(self.long), Waiter(again))
        while scheduler.arrivals or scheduler.members:
            scheduler.tick()
        return done / (time.perf_counter() - begin)

    def mix(self, rate: float, seconds: float, seed: int, whole_requests: bool) -> list[float]:
        """Seconds that 1-NFE requests took in a mix, under the scheduler or under whole-request batching."""
        rng = np.random.default_rng(seed)
        arrivals = np.cumsum(rng.exponential(1 / rate, size=max(int(rate * seconds), 1)))
        counts = np.where(rng.random(len(arrivals)) < SHORT_SHARE, self.short, self.long)
        latencies: list[float] = []
        work = self.serve_whole if whole_requests else self.serve_scheduled
        work(list(zip(arrivals.tolist(), counts.tolist(), strict=True)), latencies)
        return latencies

    def serve_scheduled(self, trace: list[tuple[float, int]], latencies: list[float]) -> None:
        scheduler = Scheduler(self.engine, FreeDevice())
        begin = time.perf_counter()
        while trace or scheduler.arrivals or scheduler.members:
            while trace and trace[0][0] <= time.perf_counter() - begin:
                due, nfe = trace.pop(0)
                keep = latencies.append if nfe == self.short else lambda _: None
                scheduler.submit(
                    self.request(nfe),
                    Waiter(lambda now, keep=keep, due=due: keep(now - begin - due)),  # type: ignore[misc]
                )
            if scheduler.arrivals or scheduler.members:
                scheduler.tick()

    def serve_whole(self, trace: list[tuple[float, int]], latencies: list[float]) -> None:
        begin, waiting = time.perf_counter(), []
        while trace or waiting:
            while trace and trace[0][0] <= time.perf_counter() - begin:
                due, nfe = trace.pop(0)
                waiting.append((due, self.engine.prepare(self.request(nfe))))
            batch, waiting = waiting[: self.wide.max_batch], waiting[self.wide.max_batch :]
            if batch:
                self.whole([member for _, member in batch])
                now = time.perf_counter() - begin
                latencies += [now - due for due, member in batch if member.request.nfe == self.short]


def run(repository: Path, student: str | None, rounds: int, seconds: float) -> None:
    """Measures, prints what came out, and one line of JSON last. Raises EngineError."""
    bench = Bench(open_engine(repository, student))
    samples: defaultdict[str, list[float]] = defaultdict(list)
    for index in tqdm(range(rounds), desc="rounds", dynamic_ncols=True):
        for _ in range(20):
            samples["overhead"].append(bench.scheduled(bench.long) / bench.bare(bench.long) - 1)
        for count in CLIENTS:
            samples[f"static {count}"].append(bench.static(min(count, bench.engine.manifest.max_batch), seconds))
            samples[f"clients {count}"].append(bench.closed_loop(count, seconds))
        rate = LOAD * max(np.median(samples[f"clients {count}"]) for count in CLIENTS)
        for name, whole in (("whole requests", True), ("scheduler", False)):
            samples[f"mix, {name}"].extend(bench.mix(rate, 5 * seconds, index, whole))
    report(bench.engine, samples, rounds, seconds)


def report(engine: Engine, samples: dict[str, list[float]], rounds: int, seconds: float) -> None:
    """The three comparisons for people, then the document."""
    best = max(float(np.median(samples[f"static {count}"])) for count in CLIENTS)
    p99 = {name: float(np.percentile(samples[f"mix, {name}"], 99)) * 1000 for name in ("whole requests", "scheduler")}
    document = {
        "benchmark": "scheduler",
        "student": engine.manifest.name,
        "fingerprint": engine.fingerprint,
        "device": device_class(),
        "rounds": rounds,
        "seconds": seconds,
        "overhead": round(float(np.median(samples["overhead"])), 4),
        "images_per_second": {str(count): round(float(np.median(samples[f"clients {count}"])), 2) for count in CLIENTS},
        "static_images_per_second": {str(count): round(float(np.median(samples[f"static {count}"])), 2) for count in CLIENTS},
        "share_of_best_static": round(max(float(np.median(samples[f"clients {c}"])) for c in CLIENTS) / best, 4),
        "one_nfe_p99_ms": {name: round(value, 2) for name, value in p99.items()},
        "one_nfe_p99_ratio": round(p99["scheduler"] / p99["whole requests"], 4),
    }
    print(f"overhead of the scheduler at batch 1: {document['overhead']:.1%} over the bare session calls")
    print(f"{'clients or rows':<18}{'scheduler':>12}{'static batch':>14}   images/s")
    for count in CLIENTS:
        print(f"{count:<18}{np.median(samples[f'clients {count}']):>12.1f}{np.median(samples[f'static {count}']):>14.1f}")
    print("p99 of 1-NFE requests in the mix: {scheduler:.1f} ms, whole requests {whole requests:.1f} ms".format(**p99))
    print(json.dumps(document))

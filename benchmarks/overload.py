"""What the server does when more is asked of it than it can give: open-loop Poisson arrivals at shares of its capacity.

Capacity is measured first, by a closed loop. Latency counts from the intended moment of sending, so that a server that holds
senders up cannot look better for it. Wanted: goodput that does not fall as the load grows, a bounded wait for whoever is let
in, refusals within milliseconds with an honest Retry-After, and memory that stays where it was. No request has a seed, so no
image is kept for later ones.

The client shares the cores with the server and takes its part of them, which is told load by load: goodput is compared with
the most that any load had under this client.
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.server import Connection, Refused, Served, cpu_seconds, resident_bytes, served
from server.engine.fingerprint import device_class
from server.generate import open_engine

PATH = "/v1/images/generations"
SHARES = (0.5, 0.7, 0.9, 1.2, 2.0, 4.0, 10.0)
QUEUE_SECONDS = 2.0
CLIENTS = 16
KEPT_SECONDS = 2.0


@dataclass
class Load:
    """What came of one share of capacity. Milliseconds from the intended sending, or of a refusal from its real one."""

    share: float
    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    without_retry_after: int = 0
    seconds: float = 0.0
    cores: dict[str, float] = field(default_factory=dict)  # that were busy: with the server, with this client
    resident_mb: float = 0.0  # of the gateway, afterwards


class Callers:
    """Kept connections to one server, as many as are needed at once; the server closes those that are idle for long."""

    def __init__(self, url: str, key: str = "none") -> None:
        self.url, self.key, self.number = url, key, 0
        self.idle: list[tuple[float, Connection]] = []  # since when

    async def post(self) -> None:
        """One image nobody has asked for before. Raises Refused."""
        self.number += 1
        since, kept = self.idle.pop() if self.idle else (0.0, None)
        connection = kept if kept and time.monotonic() - since < KEPT_SECONDS else await Connection.open(self.url)
        try:
            asked = {"prompt": f"a red circle above a blue square {self.number}"}
            await connection.post(PATH, asked, "image/png", self.key)
        finally:
            self.idle.append((time.monotonic(), connection))


async def capacity(callers: Callers, seconds: float) -> float:
    """Images per second of a closed loop."""
    begin, made = time.perf_counter(), 0

    async def client() -> None:
        nonlocal made
        while time.perf_counter() - begin < seconds:
            await callers.post()
            made += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return made / (time.perf_counter() - begin)


async def offer(callers: Callers, share: float, rate: float, seconds: float, seed: int) -> Load:
    """Poisson arrivals at `rate` for so many seconds, and the answers to all of them."""
    load, begin = Load(share), time.perf_counter()
    due = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds)))

    async def one(intended: float) -> None:
        sent = time.perf_counter()
        try:
            await callers.post()
            load.accepted.append(1000 * (time.perf_counter() - begin - intended))
            load.statuses[200] += 1
        except Refused as refusal:
            load.refused.append(1000 * (time.perf_counter() - sent))
            load.statuses[refusal.status] += 1
            load.without_retry_after += "retry-after" not in refusal.headers

    async with asyncio.TaskGroup() as group:
        for intended in due.tolist():
            await asyncio.sleep(max(begin + intended - time.perf_counter(), 0))
            group.create_task(one(intended))
    load.seconds = time.perf_counter() - begin
    return load


def run(repository: Path, student: str | None, seconds: float) -> None:
    """Measures, prints the table, and one line of JSON last. Raises EngineError."""
    engine = open_engine(repository, student)
    document: dict[str, Any] = {"benchmark": "overload", "student": engine.manifest.name, "fingerprint": engine.fingerprint}
    document |= {"device": device_class(), "seconds": seconds, "queue_seconds": QUEUE_SECONDS}
    with served(repository, "--set", f"max_queue_seconds={QUEUE_SECONDS}") as server:
        document |= asyncio.run(measure(server, seconds))
    report(document)


async def measure(server: Served, seconds: float) -> dict[str, Any]:
    """Capacity, then every share of it."""
    callers = Callers(server.url)
    await capacity(callers, 1.0)
    found = await capacity(callers, seconds)
    loads = []
    for share in tqdm(SHARES, desc="loads", dynamic_ncols=True):
        before = cpu_seconds(server.gateway), time.process_time()
        load = await offer(callers, share, share * found, seconds, seed=round(10 * share))
        after = cpu_seconds(server.gateway), time.process_time()
        load.cores = {name: (after[i] - before[i]) / load.seconds for i, name in enumerate(("server", "client"))}
        load.resident_mb = resident_bytes(server.gateway) / 1e6
        loads.append(summary(load))
    kept = loads[-1]["goodput"] / max(load["goodput"] for load in loads)
    return {"capacity": round(found, 2), "loads": loads, "goodput_of_peak": round(kept, 4)}


def summary(load: Load) -> dict[str, Any]:
    """Goodput counts images over the time until the last of them was there."""
    return {
        "share": load.share,
        "goodput": round(len(load.accepted) / load.seconds, 2),
        "accepted_ms": {name: quantile(load.accepted, q) for name, q in (("p50", 50), ("p95", 95), ("p99", 99))},
        "refused_ms": {name: quantile(load.refused, q) for name, q in (("p50", 50), ("p99", 99), ("max", 100))},
        "statuses": {str(status): count for status, count in sorted(load.statuses.items())},
        "refused_without_retry_after": load.without_retry_after,
        "cores": {name: round(busy, 3) for name, busy in load.cores.items()},
        "resident_mb": round(load.resident_mb, 1),
    }


def quantile(values: list[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 2) if values else None


def report(document: dict[str, Any]) -> None:
    """For people; the JSON line that follows is for machines."""
    print(
        f"capacity {document['capacity']} images/s; a queue of {document['queue_seconds']} s; goodput at {SHARES[-1]:g} times ",
        end="",
    )
    print(f"the capacity {document['goodput_of_peak']:.0%} of the most")
    print("load      images/s    p50 ms    p99 ms   refused    p50 ms    p99 ms    client    MB")
    for load in document["loads"]:
        refused = sum(count for status, count in load["statuses"].items() if status != "200")
        numbers = [load["goodput"], load["accepted_ms"]["p50"], load["accepted_ms"]["p99"], refused]
        numbers += [load["refused_ms"]["p50"], load["refused_ms"]["p99"]]
        print(f"{load['share']:<8}" + "".join(f"{'' if number is None else number:>10}" for number in numbers), end="")
        print(f"{load['cores']['client']:>10.0%}{load['resident_mb']:>6.0f}")
    print(json.dumps(document))

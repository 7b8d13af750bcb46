"""What one key that floods costs the others: five keys share a server, then one of them asks for five times its capacity.

The other four go on as before, with Poisson arrivals at four fifths of LOAD times the capacity. Calm and flood take turns, so
that a machine that slows down for a while slows both. Latency counts from the intended moment of sending.
"""

import asyncio
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.overload import Callers, Load, capacity, offer, quantile
from benchmarks.server import served
from server.engine.fingerprint import device_class
from server.gateway.keys import create
from server.generate import open_engine

KEYS = 5
LOAD = 0.5  # of the capacity, asked for by all keys together while none floods
FLOOD = 5.0  # times the capacity


def run(repository: Path, student: str | None, rounds: int, seconds: float) -> None:
    """Measures, prints what came out, and one line of JSON last. Raises EngineError."""
    engine = open_engine(repository, student)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        keys = [create(file, f"key {number}", ["images"]) for number in range(KEYS)]
        with served(repository, "--keys-file", str(file)) as server:
            found = asyncio.run(measure(server.url, keys, rounds, seconds))
    document = {"benchmark": "fairness", "student": engine.manifest.name, "fingerprint": engine.fingerprint}
    report(document | {"device": device_class(), "rounds": rounds, "seconds": seconds, "keys": KEYS, "load": LOAD} | found)


async def measure(url: str, keys: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Capacity, then what became of the last key and of the others, calm and flooded in turns."""
    everybody = [Callers(url, key) for key in keys]
    await capacity(everybody[0], 1.0)
    rate = await capacity(everybody[0], seconds)
    others: dict[str, list[Load]] = {"calm": [], "flood": []}
    last: dict[str, list[Load]] = {"calm": [], "flood": []}
    for number in tqdm(range(rounds), desc="rounds", dynamic_ncols=True):
        for name, share in (("calm", LOAD / KEYS), ("flood", FLOOD)):
            *loads, one = await together(everybody, [LOAD / KEYS] * (KEYS - 1) + [share], rate, seconds, seed=KEYS * number)
            others[name] += loads
            last[name].append(one)
    found = {name: {"others": summary(others[name]), "one": summary(last[name])} for name in others}
    ratio = found["flood"]["others"]["p95_ms"] / found["calm"]["others"]["p95_ms"]
    return {"capacity": round(rate, 2), **found, "others_p95_ratio": round(ratio, 4)}


async def together(everybody: list[Callers], shares: list[float], rate: float, seconds: float, seed: int) -> list[Load]:
    """What came of every key's own share of the capacity `rate`."""
    asking = enumerate(zip(everybody, shares, strict=True), seed)
    return await asyncio.gather(*(offer(callers, share, share * rate, seconds, own) for own, (callers, share) in asking))


def summary(loads: list[Load]) -> dict[str, Any]:
    """Of the same keys in all rounds."""
    accepted = [latency for load in loads for latency in load.accepted]
    statuses = sum((load.statuses for load in loads), Counter[int]())
    quantiles = {f"p{percent}_ms": quantile(accepted, percent) for percent in (50, 95, 99)}
    return quantiles | {"statuses": {str(status): count for status, count in sorted(statuses.items())}}


def report(document: dict[str, Any]) -> None:
    """For people; the JSON line that follows is for machines."""
    print(f"capacity {document['capacity']} images/s, {KEYS} keys")
    print(f"{'':<22}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}   answers by status")
    for name in ("calm", "flood"):
        for who, one in document[name].items():
            numbers = "".join(f"{one[f'p{percent}_ms']:>10}" for percent in (50, 95, 99))
            print(f"{name + ', ' + ('the others' if who == 'others' else 'the one'):<22}{numbers}   {one['statuses']}")
    print(f"the others' p95 moves by {document['others_p95_ratio'] - 1:+.0%} (goal: less than 20 %)")
    print(json.dumps(document))

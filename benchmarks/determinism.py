"""Does a request's company change its bits? Random batches of every size and slot, with the worst of mates.

A trial puts one request into a scheduler with mates that are ordinary, huge, denormal or NaN, that are cancelled on the
way or join later, and compares the latents and pixels it ends with to those it has alone. The negative control is the same
harness over a session that varies with the batch: it must be caught, or the harness proves nothing. The same session under
`determinism=strict`, which gives every call one shape, must not be; what that costs per NFE is measured beside it.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from server.engine.device import FreeDevice
from server.engine.engine import Determinism, Engine, batch_policy
from server.engine.errors import EngineError
from server.engine.request import Pixels, Progress, Request, Result
from server.engine.scheduler import Scheduler
from server.engine.session import Session, Tensors
from server.generate import open_engine

PROMPTS = ("a red circle", "a large yellow star on a purple background", "a small green ring to the left of an orange cross")
VICTIMS = 12
CONTROL_TRIALS, COST_CALLS = 50, 20
MATES = ("ordinary", "huge", "denormal", "nan", "cancelled", "late")


class Ear:
    """A sink that keeps the answer."""

    def __init__(self) -> None:
        self.wanted, self.image = True, None
        self.over = False

    def cancelled(self) -> bool:
        return not self.wanted

    def stepped(self, step: int) -> None:
        raise AssertionError("no step was to be told")

    def preview(self, step: int, image: Pixels) -> None:
        raise AssertionError("no preview was asked for")

    def done(self, result: Result) -> None:
        self.over, self.image = True, result.image

    def failed(self, error: EngineError) -> None:
        self.over = True


@dataclass(frozen=True)
class Outcome:
    """What a request ended with, as bytes: float32 latents and uint8 pixels."""

    latents: bytes
    pixels: bytes


class SplitSumStep:
    """The negative control: a step followed by a matrix product whose sums are split by the number of rows, as libraries for
    GPUs split them by the shape of a call (split-K). Within one shape every row is treated alike: a library's own product would
    not do, for BLAS rounds by shape, by slot and by its number of threads, as it was built."""

    batch_invariant = False

    def __init__(self, session: Session) -> None:
        self.session = session
        self.weight: np.ndarray | None = None

    def run(self, tensors: Tensors) -> list[np.ndarray]:
        latents, x0 = self.session.run(tensors)
        rows = latents.reshape(len(latents), -1)
        if self.weight is None:
            self.weight = np.random.default_rng(0).standard_normal((rows.shape[1], rows.shape[1]), np.float32) / 100
        return [latents + np.stack([self.product(row, len(rows)) for row in rows]).reshape(latents.shape), x0]

    def product(self, row: np.ndarray, parts: int) -> np.ndarray:
        """row [n] -> row @ weight [n], summed over `parts` stretches of n and then over these."""
        bounds = np.linspace(0, len(row), parts + 1).astype(int)[:-1]
        return np.add.reduceat(row[:, None] * self.weight, bounds, axis=0).sum(axis=0)


class Trials:
    """Trial i has batch size 1 + i mod max_batch; slots, mates and moments are drawn from `seed`."""

    def __init__(self, engine: Engine, seed: int = 0, prompts: Sequence[str] = PROMPTS) -> None:
        self.engine, self.prompts, self.rng = engine, prompts, np.random.default_rng(seed)
        self.size = next(iter(engine.manifest.sizes))
        self.alone: dict[int, Outcome] = {}
        self.mates: Counter[str] = Counter()

    def victim(self, number: int) -> Request:
        nfe = self.engine.manifest.nfe
        return Request(self.prompts[number % len(self.prompts)], number, 0, nfe[number % len(nfe)], self.size)

    def differs(self, index: int) -> bool:
        """One trial: whether company changed anything."""
        number = int(self.rng.integers(VICTIMS))
        if number not in self.alone:
            self.alone[number] = self.outcome(self.victim(number), [], 0)
        count = index % self.engine.max_batch
        mates = [MATES[kind] for kind in self.rng.integers(len(MATES), size=count)]
        self.mates.update(mates)
        return self.outcome(self.victim(number), mates, int(self.rng.integers(count + 1))) != self.alone[number]

    def outcome(self, victim: Request, mates: list[str], slot: int) -> Outcome:
        """Runs the victim in `slot` among mates until it is answered."""
        scheduler, ear = Scheduler(self.engine, FreeDevice()), Ear()
        later = [kind for kind in mates if kind == "late"]
        now = [kind for kind in mates if kind != "late"]
        slot = min(slot, len(now))
        company = [self.join(scheduler, kind) for kind in now[:slot]]
        scheduler.submit(victim, ear)
        progress = scheduler.arrivals[-1].progress
        company += [self.join(scheduler, kind) for kind in now[slot:]]
        while not ear.over:
            scheduler.tick()
            for kind, mate in company:
                mate.wanted = mate.wanted and (kind != "cancelled" or self.rng.random() < 0.5)
            if later and self.rng.random() < 0.5:
                company.append(self.join(scheduler, later.pop()))
        assert ear.image is not None
        return Outcome(progress.latents.tobytes(), ear.image.tobytes())

    def join(self, scheduler: Scheduler, kind: str) -> tuple[str, Ear]:
        """Submits a mate of a kind."""
        nfe, ear = self.engine.manifest.nfe, Ear()
        prompt = self.prompts[self.rng.integers(len(self.prompts))]
        scheduler.submit(Request(prompt, int(self.rng.integers(2**63)), 0, int(self.rng.choice(nfe)), self.size), ear)
        spoil(scheduler.arrivals[-1].progress, kind)
        return kind, ear


def spoil(progress: Progress, kind: str) -> None:
    """Gives a mate the latents that its kind is named after."""
    values = {"huge": 3e37, "denormal": 1e-42, "nan": np.nan}
    if kind in values:
        progress.latents = np.full_like(progress.latents, values[kind])


def run(repository: Path, student: str | None, trials: int, seed: int) -> int:
    """Runs the trials and the negative control, prints what happened and one line of JSON; returns the failures."""
    engine = open_engine(repository, student)
    fewer = min(trials, CONTROL_TRIALS)
    harness = Trials(engine, seed)
    failures = count(harness, trials, "trials")
    caught = count(Trials(control_of(engine, "fast"), seed), fewer, "negative control")
    strict = count(Trials(control_of(engine, "strict"), seed), fewer, "strict")
    cost = strict_cost(engine)
    print(f"{trials} random batches of 1 to {engine.max_batch}: {failures} changed a request's bits")
    print(f"negative control (a step that varies with the batch): caught in {caught} of {fewer}")
    print(f"the same step under determinism=strict: {strict} of {fewer}; an NFE of one request takes {cost:.1f} times as long")
    document: dict[str, Any] = {"benchmark": "determinism", "student": engine.manifest.name, "fingerprint": engine.fingerprint}
    document |= {"trials": trials, "failures": failures, "control_caught": caught, "strict_failures": strict}
    document |= {"strict_cost": round(cost, 2), "mates": dict(harness.mates), "seed": seed}
    print(json.dumps(document))
    return failures + strict if caught else -1


def count(harness: Trials, trials: int, what: str) -> int:
    """In how many trials company changed something."""
    return sum(harness.differs(index) for index in tqdm(range(trials), desc=what, dynamic_ncols=True))


def control_of(engine: Engine, determinism: Determinism) -> Engine:
    """The same student with a step that varies with the batch."""
    sessions = {**engine.sessions, "student_step": SplitSumStep(engine.sessions["student_step"])}
    _, fixed_batch = batch_policy(list(sessions.values()), determinism, engine.manifest.max_batch)
    return replace(engine, sessions=sessions, fixed_batch=fixed_batch, buffers={})


def strict_cost(engine: Engine) -> float:
    """How many times as long an NFE of one request takes when it is padded to a full batch; medians of interleaved calls."""
    padded = replace(engine, fixed_batch=engine.manifest.max_batch, buffers={})
    request = Request(PROMPTS[0], 0, 0, min(engine.manifest.nfe), next(iter(engine.manifest.sizes)))
    spent: dict[bool, list[float]] = {False: [], True: []}
    for index in range(2 * COST_CALLS):
        one = padded if index % 2 else engine
        progress = one.prepare(request)
        begin = time.perf_counter()
        one.step([progress])
        spent[one is padded].append(time.perf_counter() - begin)
    return float(np.median(spent[True]) / np.median(spent[False]))

"""What the scheduler counts: names, kinds and labels in one table, and a place in memory to count in."""

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[tuple[str, str], ...]

SECONDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
ROWS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


@dataclass(frozen=True)
class Metric:
    """Prometheus base units; every metric also has the label `model`. buckets: upper bounds of a histogram."""

    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = {
    "fewstep_steps_requested_total": Metric("counter", "NFEs that requests have asked for"),
    "fewstep_steps_executed_total": Metric("counter", "NFEs that moved a request on; rows of a batch count each"),
    "fewstep_finished_total": Metric("counter", "Requests answered", ("nfe", "status")),
    "fewstep_cancelled_total": Metric("counter", "Requests dropped because nobody wanted them any more", ("at",)),
    "fewstep_previews_total": Metric("counter", "x0 predictions decoded and sent"),
    "fewstep_queue_depth": Metric("gauge", "Requests that have not had their first NFE"),
    "fewstep_in_flight": Metric("gauge", "Requests that are not answered yet"),
    "fewstep_queue_wait_seconds": Metric("histogram", "From arrival to the first NFE", (), SECONDS),
    "fewstep_step_duration_seconds": Metric("histogram", "One NFE of a batch, by the member's", ("nfe", "step"), SECONDS),
    "fewstep_stage_duration_seconds": Metric("histogram", "Stages that are no NFE", ("stage",), SECONDS),
    "fewstep_batch_size": Metric("histogram", "Rows of one call", ("stage",), ROWS),
}


class Metrics(Protocol):
    """Where numbers go. Labels are those of METRICS, without `model`."""

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Raises a counter."""
        ...

    def set(self, name: str, value: float) -> None:
        """Sets a gauge."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds a value to a histogram."""
        ...


class MemoryMetrics:
    """Numbers kept in this process. A histogram is its `_count`, its `_sum` and how many values fell into each bucket, of
    which the last one has no upper bound."""

    def __init__(self) -> None:
        self.values: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        self.buckets: dict[tuple[str, Labels], list[int]] = {}

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        self.values[key(name, labels)] += amount

    def set(self, name: str, value: float) -> None:
        self.values[key(name, {})] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.values[key(f"{name}_count", labels)] += 1
        self.values[key(f"{name}_sum", labels)] += value
        bounds = METRICS[name].buckets
        counts = self.buckets.setdefault(key(name, labels), [0] * (len(bounds) + 1))
        counts[bisect_left(bounds, value)] += 1

    def total(self, name: str) -> float:
        """The sum of a counter, or of a histogram's `_count` or `_sum`, over its labels."""
        return sum(value for (known, _), value in self.values.items() if known == name)


def key(name: str, labels: dict[str, str]) -> tuple[str, Labels]:
    """How a labelled number is found again."""
    return name, tuple(sorted(labels.items()))

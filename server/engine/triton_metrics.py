"""The scheduler's numbers on Triton's own metrics endpoint."""

import threading
from collections import deque
from typing import Any

import triton_python_backend_utils as pb

from server.engine.metrics import METRICS, Labels, MemoryMetrics

FLUSH_SECONDS = 0.25


class TritonMetrics(MemoryMetrics):
    """Numbers that Triton's own metrics endpoint shows. Each one crosses processes, so they are passed on by a thread of
    their own, a few times a second."""

    def __init__(self, model: str) -> None:
        super().__init__()
        kinds = {"counter": pb.MetricFamily.COUNTER, "gauge": pb.MetricFamily.GAUGE, "histogram": pb.MetricFamily.HISTOGRAM}
        self.families = {
            name: pb.MetricFamily(name=name, description=metric.description, kind=kinds[metric.kind])
            for name, metric in METRICS.items()
        }
        self.model = model
        self.shown: dict[tuple[str, Labels], Any] = {}
        self.told: dict[tuple[str, Labels], float] = {}
        self.observed: deque[tuple[str, float, dict[str, str]]] = deque()
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.flush_until_closed, name="metrics", daemon=True)
        self.thread.start()

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.observed.append((name, value, labels))

    def flush_until_closed(self) -> None:
        while not self.stopping.wait(FLUSH_SECONDS):
            self.flush()

    def flush(self) -> None:
        """Passes on what is new since the last time."""
        for (name, labels), value in list(self.values.items()):
            told = self.told.get((name, labels))  # None: never shown, and a gauge at 0 is to be seen too
            if value != told:
                metric = self.metric(name, labels)
                metric.set(value) if METRICS[name].kind == "gauge" else metric.increment(value - (told or 0))
                self.told[name, labels] = value
        while self.observed:
            name, value, pairs = self.observed.popleft()
            self.metric(name, tuple(sorted(pairs.items()))).observe(value)

    def metric(self, name: str, labels: Labels) -> Any:
        """One series of a family, made when it is first needed."""
        if (name, labels) not in self.shown:
            buckets = {"buckets": list(METRICS[name].buckets)} if METRICS[name].buckets else {}
            self.shown[name, labels] = self.families[name].Metric(labels={"model": self.model, **dict(labels)}, **buckets)
        return self.shown[name, labels]

    def close(self) -> None:
        """Passes on the rest."""
        self.stopping.set()
        self.thread.join()
        self.flush()

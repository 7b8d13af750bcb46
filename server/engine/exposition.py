"""What schedulers have counted in memory, in Prometheus' text format, as Triton shows it of schedulers in its processes."""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TypeVar

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.engine.metrics import METRICS, Labels, MemoryMetrics

Value = TypeVar("Value")
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


def exposition(models: Mapping[str, MemoryMetrics]) -> str:
    """Every family that has a value, of every model."""
    return generate_latest(Families(models)).decode()


class Families(Collector):
    """METRICS with the values of several models."""

    def __init__(self, models: Mapping[str, MemoryMetrics]) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        for name in METRICS:
            family = empty(name)
            for model, metrics in self.models.items():
                fill(family, name, model, metrics)
            if family.samples:
                yield family


def empty(name: str) -> Family:
    """A family without values."""
    metric = METRICS[name]
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    family: Family = kinds[metric.kind](name, metric.description, labels=("model", *sorted(metric.labels)))
    return family


def fill(family: Family, name: str, model: str, metrics: MemoryMetrics) -> None:
    """Adds one model's values."""
    if isinstance(family, HistogramMetricFamily):
        for labels, counts in values_of(metrics.buckets, name):
            bounds = [*map(floatToGoString, METRICS[name].buckets), "+Inf"]
            total = metrics.values[f"{name}_sum", labels]
            family.add_metric(values(model, labels), list(zip(bounds, accumulate(counts), strict=True)), total)
    else:
        for labels, value in values_of(metrics.values, name):
            family.add_metric(values(model, labels), value)


def values_of(found: Mapping[tuple[str, Labels], Value], name: str) -> list[tuple[Labels, Value]]:
    """The series of one family; copied at once, since the scheduler's thread goes on counting."""
    return [(labels, value) for (known, labels), value in list(found.items()) if known == name]


def values(model: str, labels: Labels) -> list[str]:
    """Label values, `model` first and then in the order of their names, as `empty` has named them."""
    return [model, *(value for _, value in labels)]

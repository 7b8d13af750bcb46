"""What the gateway counts, and everything that /metrics shows: its own numbers and the backend's."""

import asyncio
import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.gateway.backend import Backend, BackendUnavailable, StudentCard
from server.gateway.record import Record

SECONDS = tuple(2**power / 1000 for power in range(16))  # 1 ms to 33 s
UNKNOWN = "unknown"
JobCounts = dict[str, dict[str, int]]
# OpenMetrics knows no counter without _total, Triton has some; without a type they keep their names.
MISNAMED_COUNTER = re.compile(r"^(# TYPE \S+(?<!_total)) counter$", re.MULTILINE)


class Metrics:
    """The gateway's own numbers, of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("model", "nfe", "status")
        self.requests = Counter(
            "fewstep_requests",
            "Requests answered with images or a video, by HTTP status or `cancelled`",
            labels,
            registry=self.registry,
        )
        self.duration = Histogram(
            "fewstep_request_duration_seconds",
            "From the beginning of a request that had images or a video made, and got them, to the last byte of the answer",
            labels[:2],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.rejected = Counter("fewstep_rejected", "Requests refused with 429 or 503", ("reason",), registry=self.registry)

    def count(self, record: Record, students: dict[str, StudentCard], seconds: float) -> None:
        """One finished request for images or a video."""
        model, nfe = bounded(record, students)
        self.requests.labels(model, nfe, record.outcome).inc()
        if record.outcome == "200" and record.images:
            self.duration.labels(model, nfe).observe(seconds)

    def count_reject(self, record: Record) -> None:
        """A refused request of any route; reasons are the codes of our own errors."""
        if record.outcome in ("429", "503"):
            self.rejected.labels(record.code or UNKNOWN).inc()


def bounded(record: Record, students: dict[str, StudentCard]) -> tuple[str, str]:
    """Values of the labels model and nfe: what is served, whatever was asked for."""
    card = students.get(record.model or "")
    if card is None:
        return UNKNOWN, ""
    return card.name, str(record.nfe) if record.nfe in card.nfe else ""


class Families(Collector):
    """One answer of /metrics. scraped: Prometheus text of the backend, None when it is down; jobs: as VideoJobs counts them."""

    def __init__(
        self, metrics: Metrics, students: dict[str, StudentCard], scraped: str | None, jobs: JobCounts | None = None
    ) -> None:
        self.metrics, self.students, self.scraped, self.jobs = metrics, students, scraped, jobs

    def collect(self) -> Iterator[Metric]:
        yield from map(without_created, self.metrics.registry.collect())
        up = "1 when the image backend runs, 0 when it is down or starting"
        yield GaugeMetricFamily("fewstep_backend_up", up, float(self.scraped is not None))
        yield engine_info(self.students)
        yield from job_families(self.jobs) if self.jobs else ()
        yield from text_string_to_metric_families(MISNAMED_COUNTER.sub(r"\1 untyped", self.scraped or ""))


def without_created(metric: Metric) -> Metric:
    """A family without the series that say when each of the others began: as many again, and nobody reads them."""
    metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    return metric


def engine_info(students: dict[str, StudentCard]) -> Metric:
    """Who makes the pixels, student by student."""
    family = InfoMetricFamily("fewstep_engine", "What runs a student", labels=("model",))
    for card in students.values():
        said = {name: card.fingerprint_parts.get(name, "") for name in ("provider", "precision")}
        family.add_metric((card.name,), said | {"fingerprint": card.fingerprint})
    return family


def job_families(jobs: JobCounts) -> Iterator[Metric]:
    """How many jobs there are now. All gateways of one database say the same: take one's, not their sum."""
    status = GaugeMetricFamily("fewstep_video_jobs", "Video jobs in the database, by status", labels=("status",))
    for name in ("queued", "in_progress", "completed", "failed"):
        status.add_metric((name,), jobs["status"].get(name, 0))
    failed = GaugeMetricFamily("fewstep_video_jobs_failed", "Those that have failed, by error code", labels=("reason",))
    for reason, count in jobs["failed"].items():
        failed.add_metric((reason,), count)
    yield from (status, failed)


async def scrape(metrics: Metrics, backend: Backend, accept: str, jobs: JobCounts | None = None) -> tuple[bytes, str]:
    """The answer of /metrics and its content type; a backend that is down takes only its own numbers away."""
    try:
        scraped = await backend.scrape()
    except BackendUnavailable:
        scraped = None
    encoder, content_type = choose_encoder(accept)
    families = Families(metrics, backend.students, scraped, jobs)
    return await asyncio.to_thread(encoder, families), content_type  # milliseconds that the event loop has not to spare

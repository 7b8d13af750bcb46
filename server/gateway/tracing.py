"""Traces of requests over OTLP: a span for the request and one for every stage and NFE. Imported only when they are wanted."""

import time
from collections.abc import Iterable

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.gateway import backend
from server.gateway.record import Record
from server.gateway.traceparent import traceparent

OPERATION = "generate_content"
EXPORT_SECONDS = 3
INT64 = 2**63


class Tracing:
    """Its own provider, so that no state of the process is touched."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: where the receiver listens, e.g. http://127.0.0.1:4318; headers and the rest by OTEL_EXPORTER_OTLP_*."""
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        self.provider = TracerProvider(resource=Resource.create({"service.name": "fewstep"}), shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self.provider.get_tracer("fewstep")
        self.propagator = TraceContextTextMapPropagator()

    def begin(self, headers: Iterable[tuple[bytes, bytes]]) -> Span:
        """The span of a request, below the caller's own if there is one."""
        headers = list(headers)
        states = [value.decode("latin-1") for name, value in headers if name == b"tracestate"]
        carrier = {"traceparent": traceparent(headers) or "", "tracestate": ",".join(states)}
        return self.tracer.start_span(OPERATION, self.propagator.extract(carrier), SpanKind.SERVER)

    def traceparent(self, span: Span) -> str:
        """What the backend is told."""
        carrier: dict[str, str] = {}
        self.propagator.inject(carrier, set_span_in_context(span))
        return carrier["traceparent"]

    def end(self, span: Span, record: Record, route: str) -> None:
        """Adds the stages, which are known only now, and ends the span."""
        if span.is_recording():
            self.describe(span, record, route)
            context, clock = set_span_in_context(span), time.time_ns() - time.perf_counter_ns()
            for index, spans in record.images.items():
                for stage in spans:
                    attributes = {"fewstep.image_index": index, "fewstep.batch_size": stage.batch}
                    self.stage(stage, clock, attributes, context)
        span.end()

    def describe(self, span: Span, record: Record, route: str) -> None:
        """Names and attributes by OpenTelemetry's conventions for HTTP and generative AI; errors by type alone."""
        attributes: dict[str, str | int] = {
            "gen_ai.operation.name": OPERATION,
            "gen_ai.provider.name": "fewstep",
            "gen_ai.output.type": "image",
            "http.request.method": "POST",
            "http.route": route,
        }
        if record.nfe is not None and record.seed is not None and record.model:
            span.update_name(f"{OPERATION} {record.model}")
            seed = record.seed if record.seed < INT64 else str(record.seed)  # OTLP's integers have a sign
            attributes |= {"gen_ai.request.model": record.model, "gen_ai.request.seed": seed, "fewstep.nfe": record.nfe}
        if record.status is not None:
            attributes["http.response.status_code"] = record.status
        span.set_attributes(attributes)
        if not record.outcome.startswith(("2", "3")):
            span.set_attribute("error.type", record.code or record.outcome)
        if record.outcome.startswith("5"):
            span.set_status(Status(StatusCode.ERROR))

    def stage(self, stage: backend.Span, clock: int, attributes: dict[str, int], context: Context) -> None:
        """clock: what time.perf_counter_ns, which all processes of a machine share, lacks to the time of day."""
        child = self.tracer.start_span(stage.stage, context, attributes=attributes, start_time=stage.begin + clock)
        child.end(stage.begin + stage.nanoseconds + clock)

    def close(self) -> None:
        """Sends what is left; blocks for seconds when the receiver is gone."""
        self.provider.shutdown()

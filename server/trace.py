"""Spans of a request as a trace that browsers draw (chrome://tracing, ui.perfetto.dev): the Trace Event Format."""

import json
from collections.abc import Sequence
from typing import Protocol


class SpanLike(Protocol):
    """A stage: begin and nanoseconds on one clock, rows that shared the call."""

    @property
    def stage(self) -> str: ...
    @property
    def begin(self) -> int: ...
    @property
    def nanoseconds(self) -> int: ...
    @property
    def batch(self) -> int: ...


def trace(spans: Sequence[SpanLike], name: str) -> str:
    """JSON with one complete event per stage, in microseconds from the first one's beginning."""
    start = min(span.begin for span in spans)
    events = [
        {
            "name": span.stage,
            "ph": "X",
            "ts": (span.begin - start) / 1000,
            "dur": span.nanoseconds / 1000,
            "pid": 1,
            "tid": 1,
            "args": {"batch": span.batch},
        }
        for span in spans
    ]
    process = {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": name}}
    return json.dumps({"traceEvents": [process, *events], "displayTimeUnit": "ms"})

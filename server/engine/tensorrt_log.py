"""What TensorRT says, kept so that an error can be told in one line. It takes one logger per process, and keeps it for good."""

import functools
from typing import Any


@functools.cache
def log_of(trt: Any) -> Any:
    """The logger of a TensorRT package, as a trt.ILogger that has `said`."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Collects errors and warnings; what is less than that nobody has asked for."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                (self.errors if severity <= trt.ILogger.ERROR else self.warnings).append(" ".join(text.split()))

        def said(self) -> str:
            """The errors in one line, or the warnings if there was none; then forgets all."""
            lines = self.errors or self.warnings or ["it does not say why"]
            self.errors, self.warnings = [], []
            return "; ".join(dict.fromkeys(lines))

    return Log()

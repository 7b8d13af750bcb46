"""What can go wrong between a request and its pixels, and how it crosses Triton's wire.

EngineError
├── StudentError       the exported student cannot be opened: says which file and how to mend it
├── InvalidRequest     the request asks for what this student cannot do: `param` names the field
├── NumericalError     NaN or Inf came out of the network: never an image
├── Cancelled          nobody wants the image any more
├── DeadlineExceeded   the request's time was up in the queue or between two NFEs
└── ShuttingDown       the engine takes no more requests
"""

import json


class EngineError(Exception):
    """Base of all errors of the engine; `code` is stable and travels over Triton, where classes cannot."""

    code = "engine_error"
    param: str | None = None


class StudentError(EngineError):
    """A model repository or one of its students is missing, incomplete or altered."""

    code = "student_error"


class InvalidRequest(EngineError):
    """The caller's fault. The message says what was received and what is legal."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class NumericalError(EngineError):
    """A network's output is not finite or not of its shape."""

    code = "numerical_error"


class Cancelled(EngineError):
    """Whoever asked went away; no answer can reach them."""

    code = "cancelled"


class DeadlineExceeded(EngineError):
    """The deadline passed before the image was done."""

    code = "deadline_exceeded"


class ShuttingDown(EngineError):
    """The engine finishes what it has and takes no more."""

    code = "shutting_down"


BY_CODE: dict[str, type[EngineError]] = {
    kind.code: kind for kind in (EngineError, NumericalError, Cancelled, DeadlineExceeded, ShuttingDown)
}


def to_wire(error: EngineError) -> str:
    """The error as one line of JSON: Triton's own error codes are too few, and they mislead."""
    return json.dumps({"code": error.code, "message": str(error), "param": error.param})


def from_wire(text: str) -> EngineError | None:
    """The error that `to_wire` wrote, or None when the words are Triton's own."""
    try:
        fields = json.loads(text[text.index("{") : text.rindex("}") + 1])
        code, message, param = fields["code"], fields["message"], fields["param"]
    except (ValueError, KeyError, TypeError):
        return None
    if code == InvalidRequest.code:
        return InvalidRequest(message, param)
    return BY_CODE.get(code, EngineError)(message)

"""Gates: a run that cannot become a student is stopped in minutes, with the reason."""

import math


class BadRunError(ValueError):
    """A run that was stopped because it cannot become a student."""


def refuse_not_finite(numbers: dict[str, float], step: int) -> None:
    """Raises BadRunError where a number of a step, such as a loss, is NaN or infinite."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise BadRunError(
                f"iteration {step}: {name} is {value}; lower the learning rates, or train with precision=bf16 or no; the last "
                "checkpoint is from before"
            )

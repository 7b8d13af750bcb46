"""Gates: a run that cannot become a student is stopped in minutes, with the reason."""

import math
from dataclasses import asdict, dataclass

NORM_FACTOR = 2.0
SHARPNESS_FACTOR = 4.0
ADHERENCE_FACTOR = 2.0


class BadRunError(ValueError):
    """A run that was stopped because it cannot become a student."""


@dataclass(frozen=True)
class Quality:
    """Of finished samples: norm, the root mean square of their latents; sharpness, the variance of a Laplacian of their
    pictures; adherence, the share whose prompt is right (0 .. 1), where an evaluator can read them."""

    norm: float
    sharpness: float
    adherence: float | None = None

    def numbers(self) -> dict[str, float]:
        return {f"sample_{name}": value for name, value in asdict(self).items() if value is not None}


def refuse_not_finite(numbers: dict[str, float], step: int) -> None:
    """Raises BadRunError where a number of a step, such as a loss, is NaN or infinite."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise BadRunError(
                f"stopped at iteration {step}: {name} is {value}; lower the learning rates, or train with precision=bf16 or "
                "no; the last checkpoint is from before"
            )


def refuse_collapse(quality: Quality, references: tuple[Quality, ...], step: int) -> None:
    """Raises BadRunError for samples whose norm is off, or that are much less sharp or right than every reference.

    A reference that is weak itself (the teacher in one step is blurred) makes its gate the looser.
    """
    refuse_not_finite(quality.numbers(), step)
    norms = [reference.norm for reference in references]
    if not min(norms) / NORM_FACTOR <= quality.norm <= max(norms) * NORM_FACTOR:
        stop(step, "latents are off-norm", quality.norm, min(norms) / NORM_FACTOR, max(norms) * NORM_FACTOR)
    least = min(reference.sharpness for reference in references) / SHARPNESS_FACTOR
    if quality.sharpness < least:
        stop(step, "sharpness has collapsed", quality.sharpness, least)
    judged = [reference.adherence for reference in references if reference.adherence is not None]
    if quality.adherence is not None and quality.adherence < min(judged) / ADHERENCE_FACTOR:
        stop(step, "prompts are no longer followed", quality.adherence, min(judged) / ADHERENCE_FACTOR)


def stop(step: int, reason: str, value: float, least: float, most: float = math.inf) -> None:
    legal = f"{least:.3g} or more" if most == math.inf else f"{least:.3g} to {most:.3g}"
    raise BadRunError(
        f"stopped at iteration {step}: {reason}: {value:.3g}, where the teacher's samples make {legal} legal; lower the "
        "learning rates; the last samples are in the run's folder"
    )

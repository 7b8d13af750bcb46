"""`fewstep replay`: makes a picture again from its own metadata, and says whether it is the same to the bit."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from server.engine.request import Request
from server.generate import open_engine
from server.metadata import Metadata, pixel_sha256, read_metadata


@dataclass(frozen=True)
class Replay:
    """identical: the pixels made now are those of the file; lines: what there is to say, for a person."""

    identical: bool
    lines: tuple[str, ...]


def replay(file: Path, prompt: str | None, repository: Path) -> Replay:
    """Raises ValueError for a file without metadata or a missing prompt, EngineError for a student that cannot be run."""
    told, pixels = read_metadata(file)
    if told.prompt is None and prompt is None:
        raise ValueError(f"{file} does not hold its prompt; pass --prompt TEXT")
    if None not in (told.prompt, prompt) and told.prompt != prompt:
        raise ValueError(f"{file} was made from another prompt than --prompt says; leave --prompt out")
    engine = open_engine(repository, told.model)
    asked = Request(told.prompt or prompt or "", told.seed, told.image_index, told.num_inference_steps, told.size)
    result = engine.run(asked)
    identical = np.array_equal(result.image, pixels)
    lines = [f"{file}: {told.model}, {told.size}, seed {told.seed}, image {told.image_index}, {told.num_inference_steps} NFE"]
    lines.append("bit-identical" if identical else compare(pixels, result.image))
    if pixel_sha256(pixels) != told.pixel_sha256:
        lines.append("the file's pixels were changed after it was made")
    lines += differences(told, result.fingerprint_parts)
    if not identical and len(lines) == 2:
        lines.append("the fingerprint is the same" + (", so the prompt must be another" if prompt else ""))
    return Replay(identical, tuple(lines))


def compare(before: npt.NDArray[np.uint8], now: npt.NDArray[np.uint8]) -> str:
    """How far two pictures are apart."""
    if before.shape != now.shape:
        return f"not identical: the file is {before.shape[1]}x{before.shape[0]}, now it is {now.shape[1]}x{now.shape[0]}"
    difference = np.abs(before.astype(np.int16) - now)
    return f"not identical: {(difference > 0).any(2).mean():.1%} of the pixels differ, by at most {difference.max()} of 255"


def differences(told: Metadata, parts: dict[str, str]) -> list[str]:
    """One line for each part of the fingerprint that is another now."""
    names = dict.fromkeys([*told.fingerprint_parts, *parts])
    changed = [name for name in names if told.fingerprint_parts.get(name) != parts.get(name)]
    return [
        f"the fingerprint differs in {name}: {told.fingerprint_parts.get(name, 'absent')} then, {parts.get(name, 'absent')} now"
        for name in changed
    ]

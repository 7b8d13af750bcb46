"""What was asked of a video -> what will be run: every default filled in, what the student cannot make refused by name."""

import hashlib
import math
import re
import secrets
import time
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from server.gateway.backend import GenerationRequest, StudentCard
from server.gateway.errors import invalid, show
from server.gateway.plan import find_student, legal_nfe, legal_prompt, legal_size, refuse_guidance, spread
from server.gateway.schemas import VideoGeneration

MILLISECOND = Decimal("0.001")
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclass(frozen=True)
class VideoPlan:
    """A video that can be made as it stands. who: the prefix of the key that asks; previews: after which NFEs its prediction is
    shown; deadline: on the clock of time.monotonic, of a job infinite."""

    who: str
    student: StudentCard
    prompt: str
    seed: int
    nfe: int
    size: str
    previews: tuple[int, ...]
    deadline: float = math.inf

    @property
    def frames(self) -> int:
        assert self.student.frames is not None
        return self.student.frames

    @property
    def fps(self) -> int:
        assert self.student.fps is not None
        return self.student.fps

    @property
    def seconds(self) -> str:
        """As the object of a video says it."""
        return duration(self.student)

    def request(self) -> GenerationRequest:
        """What the backend is asked; a job may take as long as the backend allows."""
        left = None if math.isinf(self.deadline) else max(round((self.deadline - time.monotonic()) * 1000), 1)
        student = self.student.name
        return GenerationRequest(student, self.prompt, self.seed, 0, self.nfe, self.size, self.previews, left, who=self.who)

    def document(self) -> dict[str, Any]:
        """What a job keeps, from which `planned` makes the plan again."""
        return {
            "model": self.student.name,
            "prompt": self.prompt,
            "seed": self.seed,
            "num_inference_steps": self.nfe,
            "size": self.size,
            "seconds": self.seconds,
            "previews": list(self.previews),
        }


def plan_video(who: str, asked: VideoGeneration, students: dict[str, StudentCard], deadline: float = math.inf) -> VideoPlan:
    """Raises ApiError 400, or 404 where no student that makes videos is meant or served."""
    student = find_student(asked.model, students, "video")
    refuse_guidance(asked)
    check_length(asked, student)
    nfe = legal_nfe(asked, student)
    seed = secrets.randbits(64) if asked.seed is None else asked.seed
    prompt, size = legal_prompt(asked.prompt, student), legal_size(asked.size, student)
    return VideoPlan(who, student, prompt, seed, nfe, size, spread(asked.partial_images or 0, nfe), deadline)


def planned(who: str, document: dict[str, Any], students: dict[str, StudentCard]) -> VideoPlan:
    """The plan of a job that was taken in before, perhaps by another process. Raises ApiError 404 or 400 where its student is
    no longer served, or can no longer do it."""
    asked = {name: document[name] for name in ("model", "prompt", "seed", "num_inference_steps", "size", "seconds")}
    plan = plan_video(who, VideoGeneration(**asked), students)
    return VideoPlan(who, plan.student, plan.prompt, plan.seed, plan.nfe, plan.size, tuple(document["previews"]))


def check_length(asked: VideoGeneration, student: StudentCard) -> None:
    """A student has one number of frames and one rate; raises ApiError 400 that names them."""
    assert student.frames is not None
    assert student.fps is not None
    for param, given, only in (("num_frames", asked.num_frames, student.frames), ("fps", asked.fps, student.fps)):
        if given not in (None, only):
            raise invalid(f"{param} must be {only} for {student.name}, got {show(given)}", param)
    if asked.seconds is not None and as_seconds(asked.seconds) != exact(student):
        legal = f"{duration(student)} ({student.frames} frames at {student.fps} per second)"
        raise invalid(f"seconds must be {legal} for {student.name}, got {show(asked.seconds)}", "seconds")


def as_seconds(given: str | float) -> Decimal | None:
    """What a caller means, to the millisecond; None for what is no number of seconds."""
    text = given if isinstance(given, str) else f"{given:.9f}"
    return Decimal(text).quantize(MILLISECOND) if SECONDS.fullmatch(text) else None


def exact(student: StudentCard) -> Decimal:
    """How long its videos last, to the millisecond: most lengths, as 17 frames at 24 per second, have no end in decimals."""
    assert student.frames is not None
    assert student.fps is not None
    return (Decimal(student.frames) / student.fps).quantize(MILLISECOND)


def duration(student: StudentCard) -> str:
    """The same as OpenAI writes it: "2", "6.125"."""
    return f"{exact(student).normalize():f}"


def body_sha256(asked: VideoGeneration) -> str:
    """Of what was asked, so that a form and JSON, and any order of fields, are the same body."""
    return hashlib.sha256(asked.model_dump_json(exclude_none=True).encode()).hexdigest()

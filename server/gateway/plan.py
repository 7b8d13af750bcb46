"""What was asked -> what will be run: every default filled in, every unsupported value refused by name."""

import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from server.gateway.backend import GenerationRequest, StudentCard
from server.gateway.errors import ApiError, invalid, show, show_unless_prompt
from server.gateway.schemas import NFE_BY_QUALITY, Format, Generation, ImageGeneration

RAW_FORMATS: dict[str, Format] = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
BEST = 100  # the default of output_compression, as with OpenAI
TIMEOUT_HEADER = "x-request-timeout-ms"
MediaType = Literal["image", "video"]
Kind = TypeVar("Kind")
QUALITY_BY_NFE = {nfe: quality for quality, nfe in NFE_BY_QUALITY.items()}


@dataclass(frozen=True)
class Plan:
    """A request that can be run as it stands. who: the prefix of the key that asks; raw: the answer is the bytes of the image;
    url: a link to them; previews: after which NFEs of a stream a partial image is sent; deadline: on the clock of
    time.monotonic; seeded: the caller named the seed; cache_control: the directives of the request's Cache-Control."""

    who: str
    student: StudentCard
    prompt: str
    seed: int
    image_indices: range
    nfe: int
    size: str
    format: Format
    compression: int
    embed_prompt: bool
    raw: bool
    url: bool
    stream: bool
    previews: tuple[int, ...]
    deadline: float
    seeded: bool
    cache_control: frozenset[str]

    @property
    def quality(self) -> str:
        return QUALITY_BY_NFE.get(self.nfe, "auto")

    def image(self, image_index: int) -> GenerationRequest:
        """What the backend is asked for one image."""
        student, size, left = self.student.name, self.size, max(round((self.deadline - time.monotonic()) * 1000), 1)
        return GenerationRequest(
            student, self.prompt, self.seed, image_index, self.nfe, size, self.previews, left, who=self.who
        )

    def key(self, image_index: int) -> str:
        """Of all that decides the file of an image: a sha256, so that it tells nobody the prompt."""
        decides = [self.student.name, self.student.fingerprint, self.prompt, self.seed, image_index, self.nfe, self.size]
        decides += [self.format, self.compression, self.embed_prompt]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    @property
    def reads_cache(self) -> bool:
        """Whether a kept image will do. Who draws a seed wants a new one."""
        return self.seeded and not self.cache_control & {"no-cache", "no-store"}

    @property
    def shares(self) -> bool:
        """Whether the image of an equal request in flight will do; that one has no partial images for us."""
        return self.reads_cache and not self.previews

    @property
    def writes_cache(self) -> bool:
        """Whether the image may be kept for others."""
        return self.seeded and "no-store" not in self.cache_control


def make_plan(
    who: str, asked: ImageGeneration, headers: Mapping[str, str], students: dict[str, StudentCard], longest_timeout_ms: int
) -> Plan:
    """headers: by lower-case name. Raises ApiError 400, or 404 for an unknown model."""
    refuse_unsupported(asked)
    student = find_student(asked.model, students, "image")
    raw_format = preferred(headers.get("accept", ""), RAW_FORMATS)
    nfe = legal_nfe(asked, student)
    count, first = asked.n or 1, asked.image_index or 0
    if raw_format and count > 1:
        raise invalid(f"n must be 1 for Accept: image/{raw_format}, got {count}", "n")
    if first + count > 2**32:
        raise invalid(f"image_index + n must be at most {2**32}, got {first + count}", "image_index")
    return Plan(
        who=who,
        student=student,
        prompt=legal_prompt(asked.prompt, student),
        seed=secrets.randbits(64) if asked.seed is None else asked.seed,
        image_indices=range(first, first + count),
        nfe=nfe,
        size=legal_size(asked.size, student),
        format=legal_format(asked, raw_format),
        compression=BEST if asked.output_compression is None else asked.output_compression,
        embed_prompt=bool(asked.embed_prompt),
        raw=raw_format is not None,
        url=legal_url(asked, raw_format),
        stream=legal_stream(asked, raw_format),
        previews=spread(asked.partial_images or 0, nfe),
        deadline=time.monotonic() + legal_timeout(headers.get(TIMEOUT_HEADER), longest_timeout_ms) / 1000,
        seeded=asked.seed is not None,
        cache_control=frozenset(part.strip().lower() for part in headers.get("cache-control", "").split(",")),
    )


def refuse_unsupported(asked: ImageGeneration) -> None:
    """What would change the image and is not done is refused, never ignored."""
    refuse_guidance(asked)
    if asked.background == "transparent":
        raise unsupported(asked, "background", "transparent is not supported; only opaque")
    if asked.style not in (None, "", "natural"):
        raise unsupported(asked, "style", "only natural is supported")


def refuse_guidance(asked: Generation) -> None:
    """Raises ApiError 400 for what no distilled student does."""
    if asked.negative_prompt:
        raise unsupported(asked, "negative_prompt", "is not supported by a distilled student; leave it empty")
    if asked.guidance_scale not in (None, 1):
        raise unsupported(asked, "guidance_scale", "a distilled student takes no guidance; only 1 is legal")


def unsupported(asked: Generation, param: str, said: str) -> ApiError:
    got = show_unless_prompt(param, getattr(asked, param))
    return invalid(f"{param}: {said}, got {got}", param, "unsupported_value")


def find_student(name: str | None, students: dict[str, StudentCard], media_type: MediaType | None = None) -> StudentCard:
    """The named student, or the first that makes what is wanted; media_type None: of any kind, images first.

    Raises ApiError 404; 400 for a student of the other kind; 503 before the backend has said what it serves.
    """
    if not students:
        raise ApiError(503, "the server is starting; try again", code="starting", headers={"Retry-After": "2"})
    able = [student for student in students.values() if media_type in (None, student.media_type)]
    able.sort(key=lambda student: student.media_type != "image")
    if name is None and able:
        return able[0]
    if name is not None and name not in students:
        raise ApiError(404, f"model {show(name)} is not served, only {', '.join(students)}", "model", "model_not_found")
    if not able:
        said = f"no student that makes {media_type}s is served here, only {', '.join(students)}"
        raise ApiError(404, said, "model", "model_not_found")
    assert name is not None
    if students[name] not in able:
        served = ", ".join(student.name for student in able)
        raise invalid(f"model {show(name)} makes no {media_type}s; those that do are {served}", "model")
    return students[name]


def legal_prompt(prompt: str, student: StudentCard) -> str:
    """Raises ApiError 400; the limit in tokens is the engine's to check."""
    limit = student.max_prompt_characters
    if not prompt.strip() or len(prompt) > limit:
        raise invalid(f"prompt must have 1 to {limit} characters, not all of them blank; got {len(prompt)}", "prompt")
    return prompt


def legal_nfe(asked: Generation, student: StudentCard) -> int:
    """NFE is a contract: a rung of the student's ladder, or a 400 that names the ladder."""
    nfe = student.default_nfe if asked.asked_nfe is None else asked.asked_nfe
    if nfe not in student.nfe:
        named = next((name for name in ("num_inference_steps", "steps") if getattr(asked, name) is not None), "quality")
        raise invalid(f"{named} must be one of {', '.join(map(str, student.nfe))} for {student.name}, got {show(nfe)}", named)
    return nfe


def legal_size(size: str | None, student: StudentCard) -> str:
    """Raises ApiError 400 naming the sizes the student was exported for."""
    if size in (None, "auto"):
        return student.default_size
    if size not in student.sizes:
        raise invalid(f"size must be one of {', '.join(student.sizes)} or auto for {student.name}, got {show(size)}", "size")
    return size


def legal_format(asked: ImageGeneration, raw_format: Format | None) -> Format:
    """The format of the body and of the Accept header, which must not contradict each other."""
    if raw_format and asked.output_format not in (None, raw_format):
        raise invalid(f"output_format {asked.output_format} contradicts Accept: image/{raw_format}", "output_format")
    chosen = raw_format or asked.output_format or "png"
    if chosen == "png" and asked.output_compression not in (None, BEST):
        raise invalid("output_compression is for jpeg and webp; png is lossless", "output_compression")
    return chosen


def legal_url(asked: ImageGeneration, raw_format: Format | None) -> bool:
    """Whether links are asked for. Raises ApiError 400 where the answer has no place for them."""
    wanted = asked.response_format == "url"
    if wanted and (raw_format or asked.stream):
        said = f"Accept: image/{raw_format}" if raw_format else "stream: true"
        raise invalid(f"response_format: url is answered with JSON, not with {said}", "response_format")
    return wanted


def legal_stream(asked: ImageGeneration, raw_format: Format | None) -> bool:
    """Raises ApiError 400 for partial images without a stream, and for a stream of raw bytes."""
    if asked.partial_images and not asked.stream:
        raise invalid(f"partial_images: {asked.partial_images} needs stream: true", "partial_images")
    if asked.stream and raw_format:
        raise invalid(f"stream: true is answered with text/event-stream, not with Accept: image/{raw_format}", "stream")
    return bool(asked.stream)


def spread(partial_images: int, nfe: int) -> tuple[int, ...]:
    """After which NFEs a partial image is shown: evenly spread, fewer where a request has fewer NFEs before its last."""
    count = min(partial_images, nfe - 1)
    return tuple(round(index * nfe / (count + 1)) for index in range(1, count + 1))


def legal_timeout(given: str | None, longest_ms: int) -> int:
    """Milliseconds from the header, capped by the server. Raises ApiError 400."""
    if given is None:
        return longest_ms
    if not (given.isascii() and given.isdecimal() and len(given) < 16 and int(given) > 0):
        raise invalid(f"X-Request-Timeout-Ms must be a whole number of milliseconds from 1, got {show(given)}", TIMEOUT_HEADER)
    return min(int(given), longest_ms)


def preferred(accept: str, kinds: Mapping[str, Kind]) -> Kind | None:
    """What stands for the first type that an Accept header names before application/json or a wildcard."""
    for part in accept.split(","):
        kind = part.partition(";")[0].strip().lower()
        if kind in kinds:
            return kinds[kind]
        if kind in ("application/json", "*/*"):
            return None
    return None

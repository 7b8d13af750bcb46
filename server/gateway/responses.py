"""Bodies and headers of every route's answers, for the OpenAPI document."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from server.gateway.schemas import Format
from server.gateway.timings import Timings

ERRORS = {
    400: "A value is illegal or not supported, or the body is not JSON; `param` names the field.",
    401: "No API key, or one that is not known or no longer good.",
    403: "The API key lacks the scope of this path.",
    404: "No such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not plain JSON.",
    429: "This key's rate, concurrency or share of the queue is used up; try again after Retry-After seconds.",
    500: "Our fault; the answer's x-request-id finds it in the log.",
    503: "Starting, full, shutting down, or the deadline cannot be met; try again after Retry-After seconds.",
    504: "The deadline passed.",
}
BYTES = {"schema": {"type": "string", "format": "binary"}}
ALWAYS = {
    "x-seed": "the seed that was used, drawn or given",
    "x-fingerprint": "names everything that decides the pixels",
}
UNLESS_STREAMED = {
    "ETag": "of all that decides the answer; weak for JSON",
    "Cache-Status": "RFC 9211: whether the images were kept from before, or made by an equal request at the same time",
    "Server-Timing": "queue, text_encoder, nfe1 .., vae_decoder, image_encode, total; milliseconds",
    "x-pixel-sha256": "sha256 over uint8 [H, W, 3]; one per image",
}
LINKED = {"ETag": "of the bytes", "Cache-Control": "how long the link is good"}


class Answer(BaseModel):
    """What is not listed is not sent."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """Says what is wrong, the value received, and what is legal."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    """OpenAI's envelope."""

    error: ErrorDetail


class ImageData(Answer):
    """One image, as base64 or as a link; seed and image_index make it again."""

    b64_json: str = Field("", description="absent when response_format is url")
    url: str = Field("", description="signed, expires; only when response_format is url")
    seed: int
    image_index: int
    cached: bool


class TokenDetails(Answer):
    text_tokens: int
    image_tokens: int


class Usage(Answer):
    """Tokens of the prompt, and latent positions of the images."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class Images(Answer):
    """What was made, and all it takes to make it again."""

    created: int
    data: list[ImageData]
    size: str
    quality: str
    output_format: Format
    background: str
    usage: Usage
    model: str
    num_inference_steps: int
    fingerprint: str
    timings: Timings


class StreamedImage(Answer):
    """What every event of an image says."""

    b64_json: str
    created_at: int
    size: str
    quality: str
    background: str
    output_format: Format
    image_index: int


class PartialImage(StreamedImage):
    """The image as predicted after NFE `step`."""

    type: Literal["image_generation.partial_image"]
    partial_image_index: int
    step: int


class CompletedImage(StreamedImage):
    """The image; the text tokens of its usage are counted with the first one."""

    type: Literal["image_generation.completed"]
    usage: Usage
    seed: int
    model: str
    num_inference_steps: int
    fingerprint: str
    pixel_sha256: str
    cached: bool
    timings: Timings


class StreamError(Error):
    """What failed after the first event."""

    type: Literal["error"]


class Model(Answer):
    """OpenAI's model object, with what a caller must know about a student."""

    id: str
    object: str = Field(examples=["model"])
    created: int
    owned_by: str
    media_type: str
    family: str
    revision: str
    nfe: list[int]
    default_nfe: int
    sizes: list[str]
    default_size: str
    frames: int | None = Field(description="of a video")
    fps: int | None = Field(description="of a video")
    max_prompt_characters: int
    fingerprint: str


class ModelList(Answer):
    """The students, the default one first."""

    object: str = Field(examples=["list"])
    data: list[Model]


class ModelInfo(Answer):
    """The default student. model_path: its name, under the key that SGLang's benchmark reads."""

    model_path: str
    model: Model


class Status(Answer):
    """alive or ready."""

    status: str


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route that may fail with these."""
    return {status: {"model": Error, "description": ERRORS[status]} for status in statuses}


def described(headers: dict[str, str], required: bool = True) -> dict[str, Any]:
    """OpenAPI's header objects."""
    return {
        name: {"required": required, "schema": {"type": "string"}, "description": description}
        for name, description in headers.items()
    }


def event_of(*kinds: type[Answer]) -> dict[str, Any]:
    """One server-sent event, whose data is one of these, as OpenAPI 3.2 describes items of a stream."""
    schemas = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in kinds]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": schemas}}
    properties = {"event": {"enum": [get_args(kind.model_fields["type"].annotation)[0] for kind in kinds]}, "data": data}
    return {"itemSchema": {"type": "object", "properties": properties, "required": ["event", "data"]}}


EVENTS: tuple[type[Answer], ...] = (PartialImage, CompletedImage, StreamError)
IMAGES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Images,
        "description": "The images; their bytes alone where Accept asks for an image type; events for `stream: true`.",
        "content": {f"image/{name}": BYTES for name in get_args(Format)} | {"text/event-stream": event_of(*EVENTS)},
        "headers": described(ALWAYS) | described(UNLESS_STREAMED, required=False),
    },
    304: {
        "description": "If-None-Match names this very answer, which a given seed decides.",
        "headers": described({name: (ALWAYS | UNLESS_STREAMED)[name] for name in ("ETag", "x-seed")}),
    },
    **errors(400, 404, 408, 413, 415, 429, 500, 503, 504),
}
FILES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The bytes of the image.",
        "content": {f"image/{name}": BYTES for name in get_args(Format)},
        "headers": described(LINKED),
    },
    304: {"description": "If-None-Match names this image.", "headers": described(LINKED)},
    403: {"model": Error, "description": "The signature does not fit the link."},
    410: {"model": Error, "description": "The link has expired, or the image has made room for others."},
    **errors(500),
}

"""Bodies of requests, as strict as the contract: no unknown field, no bool for an int, no value that is ignored."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Format = Literal["png", "jpeg", "webp"]
Quality = Literal["low", "medium", "high", "auto"]

NFE_BY_QUALITY = {"low": 1, "medium": 2, "high": 4}


class Generation(BaseModel):
    """What images and videos are asked for by. An absent field and null mean the same."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1, description="what is shown")]
    model: Annotated[str | None, Field(description="a student of /v1/models; absent: the first of its kind")] = None
    size: Annotated[str | None, Field(description="WIDTHxHEIGHT or auto")] = None
    seed: Annotated[int | None, Field(ge=0, le=2**64 - 1, description="absent: drawn by the server and returned")] = None
    num_inference_steps: Annotated[int | None, Field(description="NFE: denoiser evaluations")] = None
    steps: Annotated[int | None, Field(description="alias of num_inference_steps")] = None
    partial_images: Annotated[int | None, Field(ge=0, le=3, description="predictions shown on the way")] = None
    guidance_scale: Annotated[float | None, Field(description="a distilled student takes none: only 1")] = None
    negative_prompt: Annotated[str | None, Field(description="not supported by distilled students: only empty")] = None
    user: Annotated[str | None, Field(max_length=256)] = None
    safety_identifier: Annotated[str | None, Field(max_length=256)] = None

    @model_validator(mode="after")
    def one_count_of_steps(self) -> Self:
        """Raises ValueError when the alias contradicts the name."""
        if None not in (self.steps, self.num_inference_steps) and self.steps != self.num_inference_steps:
            raise ValueError("steps and num_inference_steps are the same thing and must agree")
        return self

    @property
    def asked_nfe(self) -> int | None:
        """The NFE that was named; None leaves it to the student."""
        return self.num_inference_steps if self.num_inference_steps is not None else self.steps


class ImageGeneration(Generation):
    """POST /v1/images/generations."""

    n: Annotated[int | None, Field(ge=1, le=10, description="images; image i has index image_index + i")] = None
    quality: Annotated[Quality | None, Field(description="low, medium, high: 1, 2, 4 NFE when no steps are given")] = None
    output_format: Format | None = None
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="quality of jpeg and webp (lossless at 100)")] = (
        None
    )
    response_format: Annotated[Literal["b64_json", "url"] | None, Field(description="url: a signed link that expires")] = None
    image_index: Annotated[int | None, Field(ge=0, le=2**32 - 1, description="index of the first image")] = None
    embed_prompt: Annotated[bool | None, Field(description="keep the prompt in a PNG's metadata, for replay")] = None
    stream: bool | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: str | None = None

    @property
    def asked_nfe(self) -> int | None:
        """The NFE that was named, or that the quality stands for; None leaves it to the student."""
        named = super().asked_nfe
        return named if named is not None else NFE_BY_QUALITY.get(self.quality or "auto")


class VideoGeneration(Generation):
    """POST /v1/videos, as JSON or as the fields of a form."""

    seconds: Annotated[str | float | None, Field(description="how long it lasts, as text or a number; only the student's")] = (
        None
    )
    fps: Annotated[int | None, Field(description="frames per second; only the student's")] = None
    num_frames: Annotated[int | None, Field(description="only the student's")] = None


class VideoList(BaseModel):
    """The query of GET /v1/videos."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    after: Annotated[str | None, Field(description="id of the last video of the page before")] = None
    limit: Annotated[int, Field(ge=1, le=100, description="videos on a page")] = 20
    order: Annotated[Literal["asc", "desc"], Field(description="by creation; desc: the newest first")] = "desc"


class VideoContent(BaseModel):
    """The query of GET /v1/videos/{video_id}/content."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    variant: Annotated[Literal["video", "thumbnail"], Field(description="thumbnail: one frame as WebP")] = "video"
    format: Annotated[
        Literal["mp4", "webp", "gif"] | None, Field(description="of a video; webp and gif: animations made from the mp4")
    ] = None

    @model_validator(mode="after")
    def thumbnails_are_webp(self) -> Self:
        """Raises ValueError for a format that a thumbnail has not."""
        if self.variant == "thumbnail" and self.format not in (None, "webp"):
            raise ValueError("a thumbnail is a webp; format must be that or absent")
        return self


def request_body(schema: type[BaseModel], *kinds: str) -> dict[str, Any]:
    """The OpenAPI description of a body that the route reads itself; kinds: its types, JSON alone where none is named."""
    described = {"schema": schema.model_json_schema()}
    return {"requestBody": {"required": True, "content": dict.fromkeys(kinds or ("application/json",), described)}}


def query_parameters(schema: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a query that the route reads itself."""
    named = schema.model_json_schema()["properties"].items()
    return {
        "parameters": [
            {"name": name, "in": "query", "description": said.pop("description", ""), "schema": said} for name, said in named
        ]
    }

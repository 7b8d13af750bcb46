"""Bodies of requests, as strict as the contract: no unknown field, no bool for an int, no value that is ignored."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Format = Literal["png", "jpeg", "webp"]
Quality = Literal["low", "medium", "high", "auto"]

NFE_BY_QUALITY = {"low": 1, "medium": 2, "high": 4}


class ImageGeneration(BaseModel):
    """POST /v1/images/generations. An absent field and null mean the same."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: Annotated[str, Field(min_length=1, description="what the image shows")]
    model: Annotated[str | None, Field(description="a student of /v1/models; absent: the first of them")] = None
    n: Annotated[int | None, Field(ge=1, le=10, description="images; image i has index image_index + i")] = None
    size: Annotated[str | None, Field(description="WIDTHxHEIGHT or auto")] = None
    quality: Annotated[Quality | None, Field(description="low, medium, high: 1, 2, 4 NFE when no steps are given")] = None
    output_format: Format | None = None
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="quality of jpeg and webp (lossless at 100)")] = (
        None
    )
    response_format: Annotated[Literal["b64_json", "url"] | None, Field(description="url: a signed link that expires")] = None
    seed: Annotated[int | None, Field(ge=0, le=2**64 - 1, description="absent: drawn by the server and returned")] = None
    image_index: Annotated[int | None, Field(ge=0, le=2**32 - 1, description="index of the first image")] = None
    num_inference_steps: Annotated[int | None, Field(description="NFE: denoiser evaluations per image")] = None
    steps: Annotated[int | None, Field(description="alias of num_inference_steps")] = None
    embed_prompt: Annotated[bool | None, Field(description="keep the prompt in a PNG's metadata, for replay")] = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=3)] = None
    guidance_scale: Annotated[float | None, Field(description="a distilled student takes none: only 1")] = None
    negative_prompt: Annotated[str | None, Field(description="not supported by distilled students: only empty")] = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    moderation: Literal["auto", "low"] | None = None
    style: str | None = None
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
        """The NFE that was named, or that the quality stands for; None leaves it to the student."""
        named = self.num_inference_steps if self.num_inference_steps is not None else self.steps
        return named if named is not None else NFE_BY_QUALITY.get(self.quality or "auto")


def request_body(schema: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that the route reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema.model_json_schema()}}}}

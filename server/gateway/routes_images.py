"""POST /v1/images/generations: plan, run one backend request per image, encode, answer."""

import asyncio
import base64
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.gateway.backend import Backend, BackendImage
from server.gateway.body import read_json
from server.gateway.media import Encoded, encode
from server.gateway.plan import Plan, make_plan
from server.gateway.schemas import ImageGeneration, request_body
from server.gateway.timings import Timings, measure
from server.metadata import Metadata, pixel_sha256

router = APIRouter()


@router.post("/v1/images/generations", openapi_extra=request_body(ImageGeneration), response_model=None)
async def generate_images(request: Request) -> Response:
    """Makes n images of a prompt. `Accept: image/png` (jpeg, webp) with n = 1 answers with the bytes themselves."""
    begin = time.perf_counter_ns()
    asked = await read_json(request, ImageGeneration)
    backend: Backend = request.app.state.backend
    plan = make_plan(asked, request.headers.get("accept", ""), backend.students)
    made = await run_all(backend, plan)
    described = [metadata(plan, index, image) for index, image in zip(plan.image_indices, made, strict=True)]
    files = await asyncio.gather(
        *(encode(image.image, plan.format, plan.compression, said) for image, said in zip(made, described, strict=True))
    )
    timings = measure(made, files, time.perf_counter_ns() - begin)
    headers = generation_headers(plan, made[0].fingerprint, described, timings)
    if plan.raw:
        return Response(files[0].content, media_type=f"image/{plan.format}", headers=headers)
    return JSONResponse(describe(plan, made, files, timings), headers=headers)


async def run_all(backend: Backend, plan: Plan) -> list[BackendImage]:
    """All images at once; the first failure cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(backend.generate(image)) for image in plan.images()]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def metadata(plan: Plan, index: int, image: BackendImage) -> Metadata:
    """What one image can say of itself."""
    return Metadata(
        model=plan.student.name,
        prompt=plan.prompt if plan.embed_prompt else None,
        seed=plan.seed,
        image_index=index,
        num_inference_steps=plan.nfe,
        size=plan.size,
        fingerprint=image.fingerprint,
        fingerprint_parts=image.fingerprint_parts,
        pixel_sha256=pixel_sha256(image.image),
    )


def generation_headers(plan: Plan, fingerprint: str, described: list[Metadata], timings: Timings) -> dict[str, str]:
    """x-pixel-sha256 is over uint8 [H, W, 3], whatever the file format; one per image."""
    return {
        "Server-Timing": timings.header(),
        "x-seed": str(plan.seed),
        "x-fingerprint": fingerprint,
        "x-pixel-sha256": ", ".join(image.pixel_sha256 for image in described),
    }


def describe(plan: Plan, made: list[BackendImage], files: list[Encoded], timings: Timings) -> dict[str, Any]:
    """The answer in OpenAI's shape, and what it lacks to make the images again."""
    return {
        "created": int(time.time()),
        "data": [
            {"b64_json": base64.b64encode(file.content).decode(), "seed": plan.seed, "image_index": index}
            for file, index in zip(files, plan.image_indices, strict=True)
        ],
        "size": plan.size,
        "quality": plan.quality,
        "output_format": plan.format,
        "background": "opaque",
        "usage": usage(plan, made),
        "model": plan.student.name,
        "num_inference_steps": plan.nfe,
        "fingerprint": made[0].fingerprint,
        "timings": timings.document(),
    }


def usage(plan: Plan, made: list[BackendImage]) -> dict[str, Any]:
    """Text tokens once per request; an image counts its latent positions."""
    _, height, width = plan.student.sizes[plan.size]
    text, pictures = made[0].tokens, height * width * len(made)
    return {
        "input_tokens": text,
        "output_tokens": pictures,
        "total_tokens": text + pictures,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
    }

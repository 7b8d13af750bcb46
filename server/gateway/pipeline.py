"""One image of a plan: run by the backend, encoded and described, ready to be sent."""

import asyncio
import time
from dataclasses import dataclass

from server.gateway.backend import Backend, BackendImage, OnPreview
from server.gateway.media import THREADS, Encoded, encode_now
from server.gateway.plan import Plan
from server.metadata import Metadata, pixel_sha256


@dataclass(frozen=True)
class Made:
    """One finished image. nanoseconds by stage as the engine ran them; round_trip is the whole call to the backend."""

    image_index: int
    file: Encoded
    pixel_sha256: str
    tokens: int
    fingerprint: str
    nanoseconds: dict[str, int]
    round_trip: int


async def make_image(backend: Backend, plan: Plan, image_index: int, on_preview: OnPreview | None = None) -> Made:
    """Cancelling it stops the work within one NFE. Raises an EngineError or a BackendError."""
    image = await backend.generate(plan.image(image_index), on_preview)
    return await asyncio.get_running_loop().run_in_executor(THREADS, finish, plan, image_index, image)


async def make_images(backend: Backend, plan: Plan) -> list[Made]:
    """All images at once; the first failure cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(make_image(backend, plan, index)) for index in plan.image_indices]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def finish(plan: Plan, image_index: int, image: BackendImage) -> Made:
    """Hashes, describes and encodes; takes its milliseconds from image_encode."""
    begin = time.perf_counter_ns()
    digest = pixel_sha256(image.image)
    said = Metadata(
        model=plan.student.name,
        prompt=plan.prompt if plan.embed_prompt else None,
        seed=plan.seed,
        image_index=image_index,
        num_inference_steps=plan.nfe,
        size=plan.size,
        fingerprint=image.fingerprint,
        fingerprint_parts=image.fingerprint_parts,
        pixel_sha256=digest,
    )
    content = encode_now(image.image, plan.format, plan.compression, said).content
    file = Encoded(content, time.perf_counter_ns() - begin)
    return Made(image_index, file, digest, image.tokens, image.fingerprint, image.nanoseconds, image.round_trip)

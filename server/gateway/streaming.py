"""stream: true. An image and the predictions on the way to it as server-sent events, in the shape of OpenAI's."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from server.gateway.answers import usage
from server.gateway.errors import to_api_error
from server.gateway.json_answer import to_base64, to_json
from server.gateway.made import Made
from server.gateway.media import encode
from server.gateway.pipeline import Make, Pipeline
from server.gateway.plan import Plan
from server.gateway.record import current
from server.gateway.timings import measure

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second: proxies that hold answers back let it pass


@dataclass(frozen=True)
class Preview:
    """The x0 prediction of an image after NFE `step`, uint8 [H, W, 3]."""

    image_index: int
    step: int
    image: npt.NDArray[np.uint8]


Heard = Preview | Made | Exception


async def events(pipeline: Pipeline, plan: Plan, begin: int) -> AsyncIterator[bytes]:
    """Every event of a plan as it happens, images of one request side by side.

    begin: when the request came, on the clock of time.perf_counter_ns. Raises what the first image to fail raised. Closing the
    iterator cancels the images under way.
    """
    async with pipeline.admitted(plan) as make, aclosing(hear(plan, make)) as items:
        async for item in items:
            yield completed(plan, item, begin) if isinstance(item, Made) else await partial_image(plan, item)


async def hear(plan: Plan, make: Make) -> AsyncGenerator[Preview | Made, None]:
    """What is ready, in the order in which it becomes so."""
    heard: asyncio.Queue[Heard] = asyncio.Queue()
    tasks = [asyncio.create_task(report(make, index, heard)) for index in plan.image_indices]
    waiting = len(tasks)
    try:
        while waiting:
            item = await heard.get()
            if isinstance(item, Exception):
                raise item
            waiting -= isinstance(item, Made)
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def report(make: Make, image_index: int, heard: "asyncio.Queue[Heard]") -> None:
    """Makes one image and puts into `heard` its previews, then the image or why there is none."""

    def on_preview(step: int, image: npt.NDArray[np.uint8]) -> None:
        heard.put_nowait(Preview(image_index, step, image))

    try:
        heard.put_nowait(await make(image_index, on_preview))
    except Exception as error:
        heard.put_nowait(error)


async def with_errors(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The stream after its first event; what fails from here on can only be told as an event."""
    yield first
    try:
        async for event in rest:
            yield event
    except Exception as error:
        answer = to_api_error(error)
        current().failed(answer.status, answer.code)
        yield frame("error", answer.envelope())


async def partial_image(plan: Plan, preview: Preview) -> bytes:
    """A real intermediate, in the format of the final image."""
    index = plan.previews.index(preview.step)
    file = await encode(preview.image, plan.format, plan.compression)
    more = {"partial_image_index": index, "step": preview.step, "image_index": preview.image_index}
    return frame("image_generation.partial_image", common(plan, file.content) | more)


def completed(plan: Plan, made: Made, begin: int) -> bytes:
    """The final image. Its usage counts this image alone; the text tokens are counted with the first one."""
    document = common(plan, made.file.content) | {
        "image_index": made.image_index,
        "usage": usage(plan, [made], text=made.image_index == plan.image_indices[0]),
        "seed": plan.seed,
        "model": plan.student.name,
        "num_inference_steps": plan.nfe,
        "fingerprint": made.fingerprint,
        "pixel_sha256": made.pixel_sha256,
        "cached": made.origin == "cached",
        "timings": measure([made], time.perf_counter_ns() - begin).document(),
    }
    return frame("image_generation.completed", document)


def common(plan: Plan, content: bytes) -> dict[str, Any]:
    """What every event of an image says."""
    return {
        "b64_json": to_base64(content),
        "created_at": int(time.time()),
        "size": plan.size,
        "quality": plan.quality,
        "background": "opaque",
        "output_format": plan.format,
    }


def frame(event: str, document: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no raw line ends, so it is one data line."""
    return b"event: %s\ndata: %s\n\n" % (event.encode(), to_json({"type": event, **document}))

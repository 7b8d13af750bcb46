"""POST /v1/images/generations: plan, make, answer with JSON, the bytes of the image, or a stream."""

import time
from functools import partial

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from server.gateway import answers, streaming
from server.gateway.body import read_json
from server.gateway.disconnect import unless_gone
from server.gateway.files import Files
from server.gateway.json_answer import PictureResponse
from server.gateway.pipeline import Pipeline
from server.gateway.plan import Plan, make_plan
from server.gateway.record import current
from server.gateway.responses import IMAGES
from server.gateway.schemas import ImageGeneration, request_body
from server.gateway.timings import measure

router = APIRouter()


@router.post("/v1/images/generations", responses=IMAGES, openapi_extra=request_body(ImageGeneration), response_model=None)
async def generate_images(request: Request) -> Response:
    """Makes n images of a prompt. `Accept: image/png` (jpeg, webp) with n = 1 answers with the bytes themselves;
    `stream: true` with server-sent events."""
    begin = time.perf_counter_ns()
    asked = await read_json(request, ImageGeneration)
    pipeline: Pipeline = request.app.state.pipeline
    longest = request.app.state.settings.request_timeout_ms
    current().model = asked.model
    plan = make_plan(caller(request), asked, request.headers, pipeline.backend.students, longest)
    current().planned(plan.student.name, plan.nfe, plan.seed)
    if asked.seed is not None and not plan.url and answers.etag(plan) in known_tags(request):  # a known link may have expired
        return Response(status_code=304, headers={"ETag": answers.etag(plan), "x-seed": str(plan.seed)})
    if plan.stream:
        return await stream(request, pipeline, plan, begin)
    made = await unless_gone(request, pipeline.make_all(plan))
    timings = measure(made, time.perf_counter_ns() - begin)
    headers = answers.headers(plan, made, timings)
    if plan.raw:
        return Response(made[0].file.content, media_type=f"image/{plan.format}", headers=headers)
    files: Files = request.app.state.files
    link = partial(files.link, format=plan.format, request=request)
    return PictureResponse(answers.document(plan, made, timings, link), headers=headers)


async def stream(request: Request, pipeline: Pipeline, plan: Plan, begin: int) -> Response:
    """Waits for the first event, so that what fails before it is answered with a status of its own."""
    happening = streaming.events(pipeline, plan, begin)
    first = await unless_gone(request, anext(happening))
    headers = streaming.HEADERS | {"x-seed": str(plan.seed), "x-fingerprint": plan.student.fingerprint}
    return StreamingResponse(streaming.with_errors(first, happening), media_type="text/event-stream", headers=headers)


def caller(request: Request) -> str:
    """Whose share of the queue and of each NFE a request takes: its key's prefix."""
    return str(request.scope.get("fewstep_key", "anonymous"))


def known_tags(request: Request) -> set[str]:
    """What the caller has already, from If-None-Match."""
    return {tag.strip() for tag in request.headers.get("if-none-match", "").split(",")}

"""/v1/videos: videos as jobs, found again by their id; and /v1/videos/sync, which answers with the video itself."""

import re
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from server.gateway import ranges, streaming, video_answers
from server.gateway.disconnect import unless_gone
from server.gateway.errors import invalid, show
from server.gateway.form import FORM, read_json_or_form, read_query
from server.gateway.media import Encoded
from server.gateway.plan import TIMEOUT_HEADER, legal_timeout, preferred
from server.gateway.record import current
from server.gateway.routes_images import caller
from server.gateway.schemas import JOB_ID, VideoContent, VideoGeneration, VideoList, query_parameters, request_body
from server.gateway.video_content import Content, Contents
from server.gateway.video_events import events
from server.gateway.video_jobs import VideoJobs
from server.gateway.video_maker import Clip
from server.gateway.video_media import MEDIA_TYPES, VideoFormat
from server.gateway.video_plan import VideoPlan, body_sha256, plan_video
from server.gateway.video_responses import CONTENT, DELETED, EVENTS, SYNC, TAKEN, VIDEO, VIDEOS
from server.jobs.errors import NoSuchJob
from server.jobs.models import Job
from server.jobs.store import LONGEST_KEY
from server.jobs.threads import beside

POLL = "openai-poll-after-ms"
KEY = re.compile(rf"[ -~]{{1,{LONGEST_KEY}}}")
FORMATS: dict[str, VideoFormat] = {kind: format for format, kind in MEDIA_TYPES.items()}
ASKED = request_body(VideoGeneration, "application/json", FORM)

router = APIRouter()


@router.post("/v1/videos", responses=TAKEN, openapi_extra=ASKED, response_model=None)
async def create_video(request: Request) -> Response:
    """Takes a video in, to be made by and by. `Idempotency-Key`: the same key and body give the same video, however often."""
    asked = await read_json_or_form(request, VideoGeneration)
    jobs = videos(request)
    plan = plan_video(caller(request), asked, jobs.backend.students)
    return await shown(jobs, await jobs.take(plan, idempotency_key(request), body_sha256(asked)))


@router.get("/v1/videos", responses=VIDEOS, openapi_extra=query_parameters(VideoList), response_model=None)
async def list_videos(request: Request) -> Response:
    """This key's videos, a page at a time."""
    asked, store = read_query(request, VideoList), videos(request).store
    page = await beside(store.page, caller(request), asked.after, asked.limit, asked.order)
    return JSONResponse(video_answers.page(page.jobs, page.has_more))


@router.post("/v1/videos/sync", responses=SYNC, openapi_extra=ASKED, response_model=None)
async def make_video(request: Request) -> Response:
    """Answers with the video itself: mp4, or what `Accept: image/webp` or `image/gif` asks for. Closing the connection
    stops the work."""
    begin = time.perf_counter_ns()
    asked = await read_json_or_form(request, VideoGeneration)
    if asked.partial_images:
        raise invalid("partial_images are for jobs, whose events show them", "partial_images", "unsupported_value")
    jobs, longest = videos(request), request.app.state.settings.request_timeout_ms
    plan = plan_video(caller(request), asked, jobs.backend.students)
    timeout_ms = legal_timeout(request.headers.get(TIMEOUT_HEADER), longest)
    plan = replace(plan, deadline=time.monotonic() + timeout_ms / 1000)
    current().planned(plan.student.name, plan.nfe, plan.seed)
    format = preferred(request.headers.get("accept", ""), FORMATS) or "mp4"
    async with jobs.admitted(plan):
        clip = await unless_gone(request, jobs.maker.make(plan, format))
    record(clip)
    return Response(clip.content, media_type=MEDIA_TYPES[format], headers=sync_headers(plan, clip, begin))


def record(clip: Clip) -> None:
    """For metrics, log and trace, as if it were an image."""
    current().made(0, clip.generated)
    current().encoded(0, Encoded(b"", clip.nanoseconds))


def sync_headers(plan: VideoPlan, clip: Clip, begin: int) -> dict[str, str]:
    """begin: when the request came, on the clock of time.perf_counter_ns."""
    return {
        "Server-Timing": clip.timings(time.perf_counter_ns() - begin).header(),
        "x-seed": str(plan.seed),
        "x-fingerprint": clip.generated.fingerprint,
        "x-pixel-sha256": clip.pixel_sha256,
    }


@router.get("/v1/videos/{video_id}", responses=VIDEO, response_model=None)
async def get_video(video_id: str, request: Request) -> Response:
    """How a video is getting on; `openai-poll-after-ms` says when it is worth asking again."""
    jobs = videos(request)
    return await shown(jobs, await find(jobs, video_id, request))


@router.delete("/v1/videos/{video_id}", responses=DELETED, response_model=None)
async def delete_video(video_id: str, request: Request) -> Response:
    """Forgets a video, and stops it within one NFE where it is being made."""
    await videos(request).delete(job_id(video_id), caller(request))
    return JSONResponse(video_answers.deleted(video_id))


@router.post("/v1/videos/{video_id}/cancel", responses=VIDEO, response_model=None)
async def cancel_video(video_id: str, request: Request) -> Response:
    """Stops a video within one NFE: it has then failed, with the code `cancelled`. One that has ended stays as it is."""
    jobs = videos(request)
    return await shown(jobs, await jobs.cancel(job_id(video_id), caller(request)))


@router.head("/v1/videos/{video_id}/content", response_model=None, include_in_schema=False)
@router.get(
    "/v1/videos/{video_id}/content", responses=CONTENT, openapi_extra=query_parameters(VideoContent), response_model=None
)
async def get_content(video_id: str, request: Request) -> Response:
    """A finished video or its thumbnail, whole or in part (`Range`)."""
    asked, jobs = read_query(request, VideoContent), videos(request)
    job = await find(jobs, video_id, request)
    contents: Contents = request.app.state.contents
    return await sent(await contents.find(jobs.storage, job, asked.variant, asked.format), job, request)


async def sent(content: Content, job: Job, request: Request) -> Response:
    """200, 206 or 304. Raises ApiError 416, NoSuchFile or StorageUnavailable."""
    headers = video_answers.identity(job) | {
        "ETag": content.tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",  # it may be kept, but not without asking whether it has expired
        "X-Content-Type-Options": "nosniff",
    }
    if ranges.listed(request.headers.get("if-none-match", ""), content.tag):
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        return Response(media_type=content.media_type, headers=headers | {"Content-Length": str(content.size)})
    part = ranges.wanted(request.headers, content.size, content.tag)
    if part:
        headers["Content-Range"] = ranges.content_range(part, content.size)
    headers["Content-Length"] = str(len(part) if part else content.size)
    status = 206 if part else 200
    return StreamingResponse(await content.read(part), status, headers, media_type=content.media_type)


@router.get("/v1/videos/{video_id}/events", responses=EVENTS, response_model=None)
async def get_events(video_id: str, request: Request) -> Response:
    """Server-sent events: the video as it is, then every change of it, and the predictions that `partial_images` asked for."""
    happening = events(videos(request), request.app.state.drain, job_id(video_id), caller(request))
    first = await anext(happening)
    told = streaming.with_errors(first, happening)
    return StreamingResponse(closing(told, happening), media_type="text/event-stream", headers=streaming.HEADERS)


async def closing(told: AsyncIterator[bytes], happening: Any) -> AsyncIterator[bytes]:
    """The events, which stop listening at once when the caller has gone."""
    async with aclosing(happening):
        async for event in told:
            yield event


def videos(request: Request) -> VideoJobs:
    jobs: VideoJobs = request.app.state.videos
    return jobs


async def find(jobs: VideoJobs, video_id: str, request: Request) -> Job:
    """Raises NoSuchJob, for another key's too; StoreUnavailable; ApiError."""
    return await beside(jobs.store.get, job_id(video_id), caller(request))


async def shown(jobs: VideoJobs, job: Job) -> Response:
    """The object of a video, and while there is something to wait for, for how long."""
    headers = {} if job.ended else {POLL: str(await jobs.poll_after_ms(job))}
    return JSONResponse(video_answers.document(job), headers=headers)


def job_id(given: str) -> str:
    """Raises NoSuchJob for what no job is called."""
    if not re.fullmatch(JOB_ID, given):
        raise NoSuchJob(given)
    return given


def idempotency_key(request: Request) -> str | None:
    """Raises ApiError 400."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    if len(given) > 1 or not KEY.fullmatch(given[0]):
        said = f"Idempotency-Key must be given once, with 1 to {LONGEST_KEY} printable characters of ASCII"
        raise invalid(f"{said}, got {show(given)}", "idempotency-key")
    return given[0]

"""What is said of a video: its object in OpenAI's shape, and the headers of its files."""

import time
from typing import Any

from server.gateway.errors import ApiError
from server.jobs.models import Job, StoredFile


def document(job: Job, executed_nfe: int | None = None) -> dict[str, Any]:
    """The object. executed_nfe: as heard from who makes it now, which the database learns a moment later."""
    running = executed_nfe is not None and job.status == "in_progress"
    asked, failed = job.request, job.status == "failed"
    return {
        "id": job.id,
        "object": "video",
        "model": asked["model"],
        "status": job.status,
        "progress": min(99, 100 * (executed_nfe or 0) // job.nfe) if running else job.progress,
        "created_at": int(job.created_at),
        "completed_at": seconds(job.completed_at),
        "expires_at": seconds(job.expires_at),
        "seconds": asked["seconds"],
        "size": asked["size"],
        "prompt": asked["prompt"],
        "seed": asked["seed"],
        "num_inference_steps": asked["num_inference_steps"],
        "fingerprint": job.fingerprint,
        "inference_time_s": job.inference_time_s,
        "peak_memory_mb": job.peak_memory_mb,
        "timings": job.timings,
        "error": {"code": job.error_code, "message": job.error_message} if failed else None,
    }


def seconds(moment: float | None) -> int | None:
    """Whole seconds since 1970."""
    return None if moment is None else int(moment)


def page(jobs: list[Job], has_more: bool) -> dict[str, Any]:
    """A part of the list, in OpenAI's shape."""
    ends = {"first_id": jobs[0].id, "last_id": jobs[-1].id} if jobs else {"first_id": None, "last_id": None}
    return {"object": "list", "data": [document(job) for job in jobs], **ends, "has_more": has_more}


def file_of(job: Job, variant: str) -> StoredFile:
    """The finished file of a job. Raises ApiError 404 while there is none and when there never will be, 410 when it was."""
    if job.status == "failed":
        said = f"the video failed ({job.error_code}): {job.error_message}"
        raise ApiError(404, said, "video_id", "video_failed", {"Cache-Control": "no-store"})
    if job.status != "completed":
        headers = {"Cache-Control": "no-store", "x-should-retry": "false"}
        raise ApiError(
            404, f"the video is not ready yet: {job.status}, {job.progress} %", "video_id", "video_not_ready", headers
        )
    if job.expired(time.time()) or variant not in job.files:
        said = f"the video was kept until {seconds(job.expires_at)} (seconds since 1970); ask for it again"
        raise ApiError(410, said, "video_id", "expired", {"Cache-Control": "no-store"})
    file: StoredFile = job.files[variant]
    return file


def identity(job: Job) -> dict[str, str]:
    """Headers that say which pixels a file shows; sha256 over uint8 [F, H, W, 3]."""
    told = {"x-seed": str(job.request["seed"]), "x-fingerprint": job.fingerprint, "x-pixel-sha256": job.pixel_sha256}
    return {name: value for name, value in told.items() if value is not None}


def deleted(job_id: str) -> dict[str, Any]:
    """OpenAI's word for it."""
    return {"id": job_id, "object": "video.deleted", "deleted": True}

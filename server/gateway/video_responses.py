"""Bodies and headers of the answers of /v1/videos, for the OpenAPI document."""

from typing import Any, Literal

from pydantic import Field

from server.gateway.responses import ALWAYS, BYTES, Answer, Error, StreamError, described, errors, event_of
from server.gateway.timings import Timings
from server.gateway.video_media import MEDIA_TYPES

NO_VIDEO = "No such video, or it is another key's; or no student that makes videos is served."
POLL = {"openai-poll-after-ms": "milliseconds after which it is worth asking again; absent once the video has ended"}
IDENTITY = ALWAYS | {"x-pixel-sha256": "sha256 over uint8 [F, H, W, 3]"}
OF_FILE = {"ETag": "of the bytes", "Accept-Ranges": "bytes", "Cache-Control": "ask again whether it has expired"}


class VideoError(Answer):
    """Why there will be no video."""

    code: str
    message: str


class Video(Answer):
    """A video, whatever has become of it. Times are seconds since 1970; seconds: how long it lasts."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="percent of its NFEs that are executed")
    created_at: int
    completed_at: int | None
    expires_at: int | None = Field(description="until when its files are kept")
    seconds: str
    size: str
    prompt: str
    seed: int
    num_inference_steps: int
    fingerprint: str | None
    inference_time_s: float | None = Field(description="seconds from the first to the last word of what runs the student")
    peak_memory_mb: float | None = Field(
        description="most resident memory, meanwhile, of the processes that run students, looked at ten times a second"
    )
    timings: Timings | None
    error: VideoError | None


class VideoPage(Answer):
    """A part of the list."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(Answer):
    id: str
    object: Literal["video.deleted"]
    deleted: bool


class VideoQueued(Answer):
    """The video waits."""

    type: Literal["video.queued"]
    video: Video


class VideoInProgress(Answer):
    """Sent again after every NFE."""

    type: Literal["video.in_progress"]
    video: Video


class VideoPartialImage(Answer):
    """The video as predicted after NFE `step`: its first num_frames frames, as an animated WebP."""

    type: Literal["video.partial_image"]
    video_id: str
    step: int
    partial_image_index: int
    b64_json: str
    output_format: Literal["webp"]
    num_frames: int


class VideoCompleted(Answer):
    """The last event."""

    type: Literal["video.completed"]
    video: Video


class VideoFailed(Answer):
    """The last event."""

    type: Literal["video.failed"]
    video: Video


class VideoDeleted(Answer):
    """The last event."""

    type: Literal["video.deleted"]
    video: DeletedVideo


VIDEO_EVENTS: tuple[type[Answer], ...] = (
    VideoQueued,
    VideoInProgress,
    VideoPartialImage,
    VideoCompleted,
    VideoFailed,
    VideoDeleted,
    StreamError,
)


def failing(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`errors`, of which 404 is of a video."""
    return errors(*statuses) | {404: {"model": Error, "description": NO_VIDEO}}


SENT = {"content": {kind: BYTES for kind in MEDIA_TYPES.values()}}
TAKEN: dict[int | str, dict[str, Any]] = {
    200: {"model": Video, "description": "The video, which is on disk.", "headers": described(POLL, required=False)},
    409: {"model": Error, "description": "The Idempotency-Key was sent with another body before."},
    **failing(400, 408, 413, 415, 429, 500, 503),
}
VIDEO: dict[int | str, dict[str, Any]] = {
    200: {"model": Video, "description": "The video as it is now.", "headers": described(POLL, required=False)},
    **failing(500, 503),
}
VIDEOS: dict[int | str, dict[str, Any]] = {200: {"model": VideoPage, "description": "A page."}, **failing(400, 500, 503)}
DELETED: dict[int | str, dict[str, Any]] = {200: {"model": DeletedVideo, "description": "Forgotten."}, **failing(500, 503)}
SYNC: dict[int | str, dict[str, Any]] = {
    200: {
        **SENT,
        "description": "The video.",
        "headers": described(IDENTITY | {"Server-Timing": "queue, text_encoder, nfe1 .., vae_decoder, image_encode, total"}),
    },
    **failing(400, 408, 413, 415, 429, 500, 503, 504),
}
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {**SENT, "description": "The file.", "headers": described(IDENTITY | OF_FILE)},
    206: {
        **SENT,
        "description": "The part that Range asked for.",
        "headers": described(IDENTITY | OF_FILE | {"Content-Range": "which bytes these are"}),
    },
    304: {"description": "If-None-Match names this file.", "headers": described(IDENTITY | OF_FILE)},
    410: {"model": Error, "description": "The video has expired."},
    416: {"model": Error, "description": "The file has none of the bytes that Range asked for."},
    **failing(400, 500, 503),
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events until the video has ended.", "content": {"text/event-stream": event_of(*VIDEO_EVENTS)}},
    **failing(500, 503),
}

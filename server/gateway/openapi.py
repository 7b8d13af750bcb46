"""The OpenAPI document: the routes' own description, narrowed to what the students of this server can do."""

import copy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.gateway.auth import OPEN
from server.gateway.backend import Backend, StudentCard
from server.gateway.responses import ERRORS, EVENTS, described
from server.gateway.schemas import Generation, ImageGeneration, VideoGeneration
from server.gateway.video_plan import duration
from server.gateway.video_responses import VIDEO_EVENTS

IMAGES_PATH, VIDEOS_PATH, SYNC_PATH = "/v1/images/generations", "/v1/videos", "/v1/videos/sync"
EVERY_ANSWER = {"x-request-id": "the caller's own, or one that was made up; it is in the log"}
WAIT = {"Retry-After": "seconds"}
CHALLENGE = {"WWW-Authenticate": "RFC 6750"}
EXAMPLES = {
    "four": {
        "summary": "The same picture whenever it is asked for",
        "value": {"prompt": "a red circle above a blue square", "seed": 7, "num_inference_steps": 4},
    },
    "fast": {
        "summary": "One NFE, as a small file",
        "value": {"prompt": "a red circle", "quality": "low", "output_format": "webp"},
    },
}
VIDEO_EXAMPLES = {
    "seeded": {"summary": "The same video whenever it is asked for", "value": {"prompt": "a red circle moves left", "seed": 7}},
}
TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "how long the caller waits; past that, 504. The server's own limit is the default and the most",
    "schema": {"type": "integer", "minimum": 1, "maximum": 10**15 - 1},
}
IDEMPOTENCY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "the same key and body give the same video, however often they are sent",
    "schema": {"type": "string", "pattern": "^[ -~]{1,255}$"},
}
PARAMETERS = [
    TIMEOUT,
    {
        "name": "Cache-Control",
        "in": "header",
        "description": "no-cache: make the images anew; no-store: and keep them for nobody",
        "schema": {"type": "string"},
    },
    {
        "name": "If-None-Match",
        "in": "header",
        "description": "the ETags the caller has already, with commas between",
        "schema": {"type": "string"},
    },
]


def install_openapi(app: FastAPI) -> None:
    """Makes /openapi.json tell the truth about `app`. It is kept once the backend has said what it serves."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            backend: Backend = app.state.backend
            document = describe(app, list(backend.students.values()))
            if not backend.students:
                return document
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def describe(app: FastAPI, students: list[StudentCard]) -> dict[str, Any]:
    """FastAPI's document with the headers of every answer, without the 422 that no route gives, with the students' limits."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    if app.state.keys is not None:
        ask_for_keys(document)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for status, answer in operation["responses"].items():
                headers = EVERY_ANSWER | (WAIT if status in ("429", "503") else {})
                answer["headers"] = answer.get("headers", {}) | described(headers)
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)
    document["components"]["schemas"] |= schemas_of_events()
    images, videos = ([card for card in students if card.media_type == kind] for kind in ("image", "video"))
    describe_generation(document, IMAGES_PATH, PARAMETERS, EXAMPLES, ImageGeneration, legal_images(images))
    describe_generation(document, VIDEOS_PATH, [IDEMPOTENCY], VIDEO_EXAMPLES, VideoGeneration, legal_videos(videos))
    no_previews = legal_videos(videos) | {"partial_images": {"enum": [0]}}
    describe_generation(document, SYNC_PATH, [TIMEOUT], VIDEO_EXAMPLES, VideoGeneration, no_previews)
    return document


def describe_generation(
    document: dict[str, Any],
    path: str,
    parameters: list[dict[str, Any]],
    examples: dict[str, Any],
    schema: type[Generation],
    legal: dict[str, dict[str, Any]],
) -> None:
    """One route that makes something: its headers, examples, and what is legal in its body, of whichever type that is."""
    operation = document["paths"][path]["post"]
    operation["parameters"] = parameters
    for body in operation["requestBody"]["content"].values():
        body["examples"] = examples
        body["schema"] = schema.model_json_schema()  # once more: FastAPI writes limits as floats, and 2^64 - 1 is none
        for name, limits in legal.items():
            body["schema"]["properties"][name] = narrowed(body["schema"]["properties"][name], limits)


def ask_for_keys(document: dict[str, Any]) -> None:
    """What a server with API keys says of the paths that need one."""
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    envelope = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refusals = {str(status): {"description": ERRORS[status], "content": envelope} for status in (401, 403, 429)}
    for path, operations in document["paths"].items():
        for operation in operations.values() if not OPEN.fullmatch(path) else ():
            operation["security"] = [{"key": []}]
            operation["responses"] |= copy.deepcopy(refusals)
            for status in ("401", "403"):
                operation["responses"][status]["headers"] = described(CHALLENGE)


def schemas_of_events() -> dict[str, Any]:
    """What `text/event-stream` refers to; FastAPI knows the models of JSON answers alone."""
    events = [(event, "serialization") for event in dict.fromkeys((*EVENTS, *VIDEO_EVENTS))]
    _, schemas = models_json_schema(events, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    found: dict[str, Any] = schemas["$defs"]
    return found


def legal_values(students: list[StudentCard]) -> dict[str, dict[str, Any]]:
    """Field -> JSON Schema of what is accepted; of several students, what one of them accepts."""
    ladder = sorted({nfe for student in students for nfe in student.nfe})
    sizes = list(dict.fromkeys(size for student in students for size in student.sizes))
    limits: dict[str, dict[str, Any]] = {"negative_prompt": {"enum": [""]}, "guidance_scale": {"enum": [1]}}
    if not students:
        return limits
    return limits | {
        "prompt": {"maxLength": max(student.max_prompt_characters for student in students), "pattern": r"\S"},
        "model": {"enum": [student.name for student in students]},
        "num_inference_steps": {"enum": ladder},
        "steps": {"enum": ladder},
        "size": {"enum": [*sizes, "auto"]},
    }


def legal_images(students: list[StudentCard]) -> dict[str, dict[str, Any]]:
    """What is more of images."""
    return legal_values(students) | {"background": {"enum": ["auto", "opaque"]}, "style": {"enum": ["", "natural"]}}


def legal_videos(students: list[StudentCard]) -> dict[str, dict[str, Any]]:
    """What is more of videos."""
    lengths = dict.fromkeys(value for student in students for value in (duration(student), float(duration(student))))
    told = {"seconds": {"enum": list(lengths)}} if students else {}
    for name, given in (("fps", "fps"), ("num_frames", "frames")):
        if students:
            told[name] = {"enum": sorted({getattr(student, given) for student in students})}
    return legal_values(students) | told


def narrowed(described: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """A property with fewer legal values; null stays legal where it was."""
    kept = {key: value for key, value in described.items() if key in ("title", "description")}
    if "enum" in limits:
        return kept | {"enum": [*limits["enum"], *([None] if "anyOf" in described else [])]}
    return described | limits

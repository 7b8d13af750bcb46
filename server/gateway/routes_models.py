"""What is served, and whether it is alive."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server.gateway.backend import Backend, StudentCard
from server.gateway.drain import RETRY_AFTER
from server.gateway.errors import ApiError
from server.gateway.plan import find_student
from server.gateway.responses import Model, ModelInfo, ModelList, Status, errors

router = APIRouter()


@router.get("/v1/models", response_model=ModelList, responses=errors(500))
async def list_models(request: Request) -> dict[str, Any]:
    """The students, the default one first."""
    return {"object": "list", "data": [describe(card, request) for card in students(request).values()]}


@router.get("/v1/models/{model}", response_model=Model, responses=errors(404, 500, 503))
async def get_model(model: str, request: Request) -> dict[str, Any]:
    """One student."""
    return describe(find_student(model, students(request)), request)


@router.get("/v1/model_info", response_model=ModelInfo, responses=errors(500, 503))
async def model_info(request: Request) -> dict[str, Any]:
    """The default student, for benchmark scripts that ask for a model's name before they begin."""
    card = find_student(None, students(request))
    return {"model_path": card.name, "model": describe(card, request)}


@router.get("/livez", response_model=Status)
async def livez() -> dict[str, str]:
    """200 while the gateway's event loop runs, whatever the backend does."""
    return {"status": "alive"}


@router.get("/readyz", response_model=Status, responses=errors(500, 503))
async def readyz(request: Request) -> JSONResponse:
    """200 when every student makes an image now; 503 otherwise."""
    return await readiness(request)


@router.get("/health", response_model=Status, responses=errors(500, 503))
async def health(request: Request) -> JSONResponse:
    """The same as /readyz, under the name that benchmarks wait for."""
    return await readiness(request)


async def readiness(request: Request) -> JSONResponse:
    """Asks the backend for a real image, unless the server is ending anyway."""
    state, headers = request.app.state, {"Retry-After": RETRY_AFTER}
    if state.drain.draining:
        raise ApiError(503, "not ready: the server is shutting down", code="draining", headers=headers)
    if not await state.readiness.now():
        raise ApiError(503, "not ready: a student makes no image now", code="not_ready", headers=headers)
    return JSONResponse({"status": "ready"})


def students(request: Request) -> dict[str, StudentCard]:
    backend: Backend = request.app.state.backend
    return backend.students


def describe(card: StudentCard, request: Request) -> dict[str, Any]:
    """OpenAI's model object, with what a caller must know about a student."""
    return {
        "id": card.name,
        "object": "model",
        "created": request.app.state.created,
        "owned_by": "fewstep",
        "media_type": card.media_type,
        "family": card.family,
        "revision": card.revision,
        "nfe": list(card.nfe),
        "default_nfe": card.default_nfe,
        "sizes": list(card.sizes),
        "default_size": card.default_size,
        "frames": card.frames,
        "fps": card.fps,
        "max_prompt_characters": card.max_prompt_characters,
        "fingerprint": card.fingerprint,
    }

"""GET /metrics, for Prometheus."""

from fastapi import APIRouter, Request, Response

from server.gateway.metrics import scrape
from server.gateway.responses import errors

router = APIRouter()

FORMATS = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")}


@router.get("/metrics", response_class=Response, responses=errors(500) | {200: {"content": FORMATS}})
async def metrics(request: Request) -> Response:
    """Prometheus text, or OpenMetrics when the Accept header asks for it."""
    state = request.app.state
    accept, jobs = request.headers.get("accept", ""), await state.videos.counts()
    content, content_type = await scrape(state.metrics, state.backend, accept, jobs)
    return Response(content, headers={"Content-Type": content_type})

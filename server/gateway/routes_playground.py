"""GET /: the playground, one static page that asks this server alone."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parent / "static"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data: blob:",  # pictures and previews arrive as base64, thumbnails and animations are shown as blobs
    "media-src blob:",  # videos are fetched with the key, which an element's src could not send
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
HEADERS = {
    "Content-Security-Policy": "; ".join(POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept by the browser, but asked for again: a new server never meets an old script
}


@dataclass(frozen=True)
class File:
    """A file of the page. etag: of its contents, so that it is the same on every replica."""

    content: bytes
    media_type: str
    etag: str


def read(path: Path) -> File:
    content = path.read_bytes()
    return File(content, MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


FILES = {path.name: read(path) for path in sorted(STATIC.iterdir())}


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page itself."""
    return answer(request, FILES["index.html"])


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def part(request: Request, name: str) -> Response:
    """A style sheet or script of the page. Raises HTTPException 404."""
    if name not in FILES:
        raise HTTPException(404)
    return answer(request, FILES[name])


def answer(request: Request, file: File) -> Response:
    """The file, or 304 when the browser has it."""
    headers = HEADERS | {"ETag": file.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {file.etag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)

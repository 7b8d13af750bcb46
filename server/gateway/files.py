"""Links to images: signed, expiring, good without an API key, for as long as memory holds the bytes.

The address of a file is /files/NAME?expires=UNIX_SECONDS&signature=HEX: NAME is the digest of its bytes, the signature an
HMAC-SHA256 over both. It is not below /v1/files, where OpenAI's clients look for files that were uploaded.
"""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from urllib.parse import urlencode

from cachetools import TTLCache
from fastapi import APIRouter, Request, Response

from server.gateway.errors import ApiError
from server.gateway.responses import FILES
from server.gateway.schemas import Format
from server.gateway.settings import Settings

TTL_SECONDS = 3600
BUDGET = 256 * 10**6  # bytes of images

router = APIRouter()


@dataclass(frozen=True)
class File:
    """An image in memory."""

    content: bytes
    media_type: str


class Files:
    """Of bounded size: images that expired go first, then those that nobody has asked for longest. Not for several threads."""

    def __init__(
        self, secret: bytes | None = None, ttl_seconds: int = TTL_SECONDS, public_url: str | None = None, budget: int = BUDGET
    ) -> None:
        """secret: absent, a new one, so that links end with the process; public_url: absent, links name the host that the
        caller named; budget in bytes."""
        self.secret = secret or secrets.token_bytes(32)
        self.ttl_seconds, self.public_url = ttl_seconds, public_url
        self.kept: TTLCache[str, File] = TTLCache(budget, ttl_seconds, getsizeof=lambda file: len(file.content))

    def link(self, content: bytes, format: Format, request: Request) -> str:
        """Keeps an image and returns its address for the caller of `request`."""
        expires = int(time.time()) + self.ttl_seconds
        name = f"{hashlib.sha256(content).hexdigest()}.{format}"
        self.kept[name] = File(content, f"image/{format}")
        query = urlencode({"expires": expires, "signature": self.signature(name, str(expires))})
        base = self.public_url or str(request.base_url)
        return f"{base.rstrip('/')}/files/{name}?{query}"

    def open(self, name: str, expires: str, signature: str) -> File:
        """The file of a link. Raises ApiError 403 for a link we never made, 410 for one that has expired or whose image is
        no longer kept: the signature says that there was one."""
        if not hmac.compare_digest(self.signature(name, expires).encode(), signature.encode()):
            raise refused(403, "the signature does not fit the link; use it as it was given", "bad_signature")
        if int(expires) <= time.time():
            raise refused(410, f"the link was good until {expires} (seconds since 1970); ask for the image again", "expired")
        file = self.kept.get(name)
        if file is None:
            raise refused(410, "the image is no longer kept; the same request with its seed makes it again", "not_kept")
        return file

    def signature(self, name: str, expires: str) -> str:
        """Hexadecimal. Neither part of what is signed can hold the line end between them, once it was signed by us."""
        return hmac.digest(self.secret, f"{name}\n{expires}".encode(), "sha256").hex()


def open_files(settings: Settings) -> Files:
    """As the settings want them."""
    secret = settings.url_secret.get_secret_value().encode() if settings.url_secret else None
    return Files(secret, settings.url_ttl_seconds, settings.public_url, settings.url_memory_mb * 10**6)


def refused(status: int, message: str, code: str) -> ApiError:
    """An answer that no cache keeps: caches may keep a 410 without being told to."""
    return ApiError(status, message, None, code, {"Cache-Control": "no-store"})


@router.head("/files/{name}", response_model=None, include_in_schema=False)
@router.get("/files/{name}", response_model=None, responses=FILES, response_class=Response)
async def get_file(name: str, request: Request, expires: str = "", signature: str = "") -> Response:
    """The bytes of an image whose link an answer gave."""
    files: Files = request.app.state.files
    file = files.open(name, expires, signature)
    tag = f'"{name.partition(".")[0]}"'
    headers = {
        "ETag": tag,
        "Cache-Control": f"private, max-age={max(0, int(expires) - int(time.time()))}, immutable",
        "X-Content-Type-Options": "nosniff",
    }
    known = {given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")}
    if known & {tag, "*"}:
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        return Response(media_type=file.media_type, headers=headers | {"Content-Length": str(len(file.content))})
    return Response(file.content, media_type=file.media_type, headers=headers)

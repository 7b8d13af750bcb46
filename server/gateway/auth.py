"""Who is asking: every request needs an API key, once there are any, and is counted against it before its body is read."""

import base64
import re
from collections import defaultdict
from datetime import UTC, datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.gateway.errors import ApiError
from server.gateway.keys import Key, KeyStore
from server.gateway.limits import Usage

ANONYMOUS = "anonymous"
# No secrets here: the playground's page, which asks for a key itself, and what orchestrators look at. A link to an image is
# signed, which is its key.
OPEN = re.compile(r"/|/livez|/readyz|/health|/playground/[^/]+|/docs-assets/[^/]+|/files/[^/]+")
# Pages for a browser, which asks for a name and a password of its own accord and sends them as RFC 7617 has it. Not for routes
# that do something: a browser sends them along with whatever any page of any origin asks for.
BROWSED = re.compile(r"/docs|/openapi\.json")
# What may be seen with any key is whatever else there is, e.g. /docs.
SCOPED = {
    "images": re.compile(r"/v1/images(/.*)?", re.S),
    "videos": re.compile(r"/v1/videos(/.*)?", re.S),
    "models": re.compile(r"/v1/(models|model_info)(/.*)?", re.S),
    "metrics": re.compile(r"/metrics"),
}


class Auth:
    """ASGI middleware. Tells the rest who asks: scope["fewstep_key"] is the key's prefix, or "anonymous"."""

    def __init__(self, app: ASGIApp, keys: KeyStore | None) -> None:
        """keys: None for a server that asks nobody for a key."""
        self.app, self.keys = app, keys
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["fewstep_key"] = ANONYMOUS
        if scope["type"] != "http" or self.keys is None or OPEN.fullmatch(scope["path"]):
            return await self.app(scope, receive, send)
        try:
            key = identify(self.keys, scope)
            scope["fewstep_key"] = key.prefix
            authorize(key, scope["path"])
            usage = self.usage[key.prefix]
            usage.enter(key)
        except ApiError as refusal:
            return await refusal.response()(scope, receive, send)
        try:
            await self.app(scope, receive, with_headers(send, usage, key))
        finally:
            usage.leave()


def identify(keys: KeyStore, scope: Scope) -> Key:
    """The active key of `Authorization: Bearer KEY`; on pages for a browser also the password. Raises ApiError 401."""
    browsed = BROWSED.fullmatch(scope["path"]) is not None
    scheme, _, presented = credentials(scope).partition(" ")
    if scheme.lower() == "basic" and browsed:
        scheme, presented = "bearer", password(presented)
    if scheme.lower() != "bearer" or not presented.strip():
        raise unauthorized("an API key is needed: send it as `Authorization: Bearer KEY`", "missing_api_key", browsed)
    key = keys.find(presented.strip())
    if key is None:
        raise unauthorized("this API key is not known here", "invalid_api_key", browsed)
    state = key.state(datetime.now(UTC))
    if state != "active":
        raise unauthorized(f"this API key is {state}", "invalid_api_key", browsed)
    return key


def password(presented: str) -> str:
    """Of base64("name:password"), whatever the name; empty where it is anything else."""
    try:
        return base64.b64decode(presented.strip(), validate=True).decode("latin-1").partition(":")[2]
    except ValueError:
        return ""


def credentials(scope: Scope) -> str:
    """The Authorization header; two of them are none, since others might read the other one."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    return given[0].decode("latin-1") if len(given) == 1 else ""


def authorize(key: Key, path: str) -> None:
    """Raises ApiError 403 when the key lacks the scope of the path."""
    for wanted, paths in SCOPED.items():
        if paths.fullmatch(path) and wanted not in key.scopes:
            said = f"this API key lacks the scope {wanted!r}; it has {', '.join(key.scopes) or 'none'}"
            challenge = f'Bearer realm="fewstep", error="insufficient_scope", scope="{wanted}"'
            raise ApiError(403, said, code="insufficient_scope", headers={"WWW-Authenticate": challenge})


def unauthorized(message: str, code: str, browsed: bool) -> ApiError:
    """401; RFC 6750 names an error only for a key that was given. browsed: a browser may ask its user for the key."""
    challenge = 'Bearer realm="fewstep"' + ("" if code == "missing_api_key" else ', error="invalid_token"')
    challenge += ', Basic realm="fewstep: the key is the password", charset="UTF-8"' if browsed else ""
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": challenge})


def with_headers(send: Send, usage: Usage, key: Key) -> Send:
    """`send`, telling the key what it has left."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            pairs = [(name.lower().encode(), value.encode()) for name, value in usage.headers(key).items()]
            message["headers"] = [*message.get("headers", []), *pairs]
        await send(message)

    return told

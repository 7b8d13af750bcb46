"""A full server refuses before it reads: under a flood, reading and planning what cannot be let in would cost the cores that
those who are in are waiting for."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.gateway.admission import Admission
from server.gateway.observe import IMAGES


class Shedding:
    """ASGI middleware, inside of the one that knows who asks. A repeat that the cache could have answered is refused too."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self.app, self.admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError 429 or 503."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == IMAGES:
            self.admission.check_room(scope.get("fewstep_key", "anonymous"))
        await self.app(scope, receive, send)

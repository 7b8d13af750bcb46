"""Whether every student makes an image now, asked of the students themselves but not by every caller anew."""

import asyncio
import time

from server.gateway.backend import Backend

SHARED_SECONDS = 1.0


class Readiness:
    """One question to the backend at a time; its answer is good for SHARED_SECONDS."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.asking = asyncio.Lock()
        self.answer, self.answered = False, float("-inf")

    async def now(self) -> bool:
        """At most SHARED_SECONDS old."""
        async with self.asking:
            if time.monotonic() - self.answered > SHARED_SECONDS:
                self.answer = await self.backend.ready()
                self.answered = time.monotonic()
            return self.answer

"""A caller who has gone away stops the work that was done for them."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from server.gateway.errors import ApiError

Value = TypeVar("Value")


async def unless_gone(request: Request, work: Awaitable[Value]) -> Value:
    """The result of `work`, unless the caller's connection closes first: then it is cancelled, and ApiError 499 raised.

    The body must have been read. 499 is what nginx writes into its log for this; nobody is there to receive it.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.create_task(closed(request))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the caller closed the connection", code="cancelled")
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def closed(request: Request) -> None:
    """Returns once the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

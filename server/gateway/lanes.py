"""How much of one key's work the backend has at a time; the rest waits here, where it is no burden to anybody.

The scheduler shares its device evenly, but before that Triton reads every prompt in the order of arrival: behind a burst of 250
requests of one key, the first of another key was read half a second late.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.gateway.backend import DeadlineExceeded
from server.gateway.plan import Plan

MOST = 48  # images: three full batches, from which the scheduler can choose and by which it knows a flood


@dataclass(eq=False)
class Waiting:
    """An image that is not with the backend yet."""

    plan: Plan
    number: int
    place: "asyncio.Future[None]"

    @property
    def urgency(self) -> tuple[float, int]:
        return self.plan.deadline, self.number


class Lane:
    """One key's. Places go to the most urgent and to the shortest by turns, so that neither waits for all of the others."""

    def __init__(self) -> None:
        self.inside = self.number = 0
        self.shortest = False  # whether the next place is for the shortest
        self.waiting: list[Waiting] = []

    async def enter(self, plan: Plan, most: int) -> None:
        """Waits for one of `most` places, which must be left in the end. Raises DeadlineExceeded."""
        if self.inside < most:
            self.inside += 1
            return
        self.number += 1
        one = Waiting(plan, self.number, asyncio.get_running_loop().create_future())
        self.waiting.append(one)
        try:
            async with asyncio.timeout(max(plan.deadline - time.monotonic(), 0.0)):
                await one.place
        except BaseException as error:
            if one in self.waiting:
                self.waiting.remove(one)
            else:
                self.leave()  # it was given a place that it has no use for any more
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the deadline passed before the image was begun") from None
            raise

    def leave(self) -> None:
        """Gives the place to the next, if anybody waits."""
        if not self.waiting:
            self.inside -= 1
            return
        following = min(self.waiting, key=lambda one: (one.plan.nfe if self.shortest else 0, one.urgency))
        self.shortest = not self.shortest
        self.waiting.remove(following)
        if not following.place.done():
            following.place.set_result(None)


class Lanes:
    """By key."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.lanes: dict[str, Lane] = {}

    @asynccontextmanager
    async def place(self, plan: Plan) -> AsyncIterator[None]:
        """Room with the backend for one image of a plan. Raises DeadlineExceeded."""
        lane = self.lanes.setdefault(plan.who, Lane())
        try:
            await lane.enter(plan, self.most)
            try:
                yield
            finally:
                lane.leave()
        finally:
            if not lane.inside:
                self.lanes.pop(plan.who, None)

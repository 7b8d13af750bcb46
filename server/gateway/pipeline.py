"""The images of a plan: from the cache, shared with an equal request in flight, or made by the backend and encoded."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from server.gateway.admission import Admission
from server.gateway.backend import Backend, Generated, OnPreview
from server.gateway.lanes import Lanes
from server.gateway.made import Made
from server.gateway.media import Encoded, beside, encode_now
from server.gateway.plan import Plan
from server.gateway.record import current
from server.gateway.results import Results
from server.metadata import Metadata, pixel_sha256

Make = Callable[[int, OnPreview | None], Awaitable[Made]]


class Pipeline:
    """Makes images for every route. results None: nothing is kept and nothing is shared."""

    def __init__(self, backend: Backend, admission: Admission, results: Results | None) -> None:
        self.backend, self.admission, self.results, self.lanes = backend, admission, results, Lanes()

    async def make_all(self, plan: Plan) -> list[Made]:
        """All images at once; the first failure cancels the others."""
        async with self.admitted(plan) as make:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(waited(make(index, None))) for index in plan.image_indices]
            except* Exception as failures:
                raise failures.exceptions[0] from None
            return [task.result() for task in tasks]

    @asynccontextmanager
    async def admitted(self, plan: Plan) -> AsyncIterator[Make]:
        """Room in the queue for what a plan needs beyond what is known or under way already; gives what makes one image of it.
        Raises ApiError 429 or 503."""
        known = await self.known(plan)
        new = [index for index in plan.image_indices if index not in known and not self.in_flight(plan, index)]

        async def make(image_index: int, on_preview: OnPreview | None) -> Made:
            return known.get(image_index) or await self.make(plan, image_index, on_preview)

        with self.admission.admitted(plan, len(new)):
            yield make

    async def known(self, plan: Plan) -> dict[int, Made]:
        """The images that need not be made, by image index."""
        if self.results is None or not plan.reads_cache:
            return {}
        found = {index: await self.results.find(plan.key(index), index) for index in plan.image_indices}
        return {index: made for index, made in found.items() if made}

    def in_flight(self, plan: Plan, image_index: int) -> bool:
        return self.results is not None and plan.shares and plan.key(image_index) in self.results.flights

    async def make(self, plan: Plan, image_index: int, on_preview: OnPreview | None = None) -> Made:
        """One image that is not known. Cancelling it stops the work within one NFE, unless somebody else waits for it too."""
        if self.results is None or not plan.shares:
            return await self.execute(plan, image_index, on_preview)
        return await self.results.share(plan.key(image_index), plan.deadline, lambda: self.execute(plan, image_index, None))

    async def execute(self, plan: Plan, image_index: int, on_preview: OnPreview | None) -> Made:
        """By the backend. Raises an EngineError or a BackendError."""
        async with self.lanes.place(plan):
            image = await self.backend.generate(plan.image(image_index), on_preview)
        self.admission.learn(plan, image)
        current().made(image_index, image)
        made = await beside(image.image, plan.format, partial(finish, plan, image_index, image))
        current().encoded(image_index, made.file)
        if self.results and plan.writes_cache:
            self.results.keep(plan.key(image_index), made)
        return made


async def waited(work: Awaitable[Made]) -> Made:
    """A coroutine, as tasks want it."""
    return await work


def finish(plan: Plan, image_index: int, image: Generated) -> Made:
    """Hashes, describes and encodes; what that takes is image_encode."""
    begin = time.perf_counter_ns()
    digest = pixel_sha256(image.image)
    said = Metadata(
        model=plan.student.name,
        prompt=plan.prompt if plan.embed_prompt else None,
        seed=plan.seed,
        image_index=image_index,
        num_inference_steps=plan.nfe,
        size=plan.size,
        fingerprint=image.fingerprint,
        fingerprint_parts=image.fingerprint_parts,
        pixel_sha256=digest,
    )
    content = encode_now(image.image, plan.format, plan.compression, said).content
    file = Encoded(content, time.perf_counter_ns() - begin)
    return Made(image_index, file, digest, image.tokens, image.fingerprint, image.nanoseconds, image.round_trip)

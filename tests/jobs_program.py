"""A small server without HTTP, for tests to kill: takes in one clip, makes it with a real student in process, keeps its files.

It runs in processes of its own, forked from one that has imported everything, which saves a second each time. At the point that
is named to it, it sends itself a signal; the points lie around the product's own calls, which know nothing of them.
"""

import asyncio
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from sqlalchemy import event

from server.gateway.backend import GenerationRequest
from server.gateway.inprocess_backend import InProcessBackend
from server.jobs.models import Facts, Job, Lease
from server.jobs.storage import LocalStorage
from server.jobs.store import JobStore
from server.jobs.worker import Make, OnProgress, Result, Worker

POINTS = (
    "before the insert commits",
    "after the insert commits",
    "at the lease",
    "at NFE 1",
    "at NFE 2",
    "at NFE 3",
    "at NFE 4",
    "before the file is renamed",
    "after the file is renamed",
    "before the update commits",
    "after the update commits",
)
NFE = 4
REQUEST = {"prompt": "a red circle moves left", "seed": 7}

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Program:
    """Where it keeps things, a repository with one student of videos, and when it sends itself which signal. ahead: seconds by
    which its clock is ahead of the time, as after a long while without a server."""

    url: str
    folder: Path
    repository: Path
    point: str | None = None
    signal: int = signal.SIGKILL
    ahead: float = 0.0

    def run(self) -> int:
        """To its end or its death; the exit status, which is minus the signal's number."""
        process = self.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def start(self) -> ForkServerProcess:
        process = PROCESSES.Process(target=self.main)
        process.start()
        return process

    def main(self) -> None:
        # A device of its own, as on a machine of its own: a process that is stopped may be stopped while it holds its device.
        os.environ["FEWSTEP_LOCKS"] = str(self.folder / f"locks-{os.getpid()}")
        asyncio.run(self.serve())

    async def serve(self) -> None:
        """Acknowledges a job by a file, in place of an answer to its caller, and works until it has ended or SIGTERM comes."""
        backend = InProcessBackend(self.repository)
        await backend.start()
        store = JobStore(self.url, clock=lambda: time.time() + self.ahead)
        self.place_points(store)
        worker = Worker(store, LocalStorage(self.folder / "files"), self.maker(backend), poll_seconds=0.01)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        job, _ = store.create(REQUEST, "ann", NFE, "the caller's key", "the body")
        (self.folder / "acknowledged").write_text(job.id)
        running = asyncio.create_task(worker.run())
        while not (running.done() or store.get(job.id, "ann").ended):
            await asyncio.sleep(0.01)
        worker.stop()
        await running
        await backend.stop()

    def maker(self, backend: InProcessBackend) -> Make:
        """What is made is logged; the bytes of the frames are file enough here."""

        async def make(job: Job, on_progress: OnProgress) -> Result:
            def on_step(executed: int) -> None:
                if self.signal == signal.SIGSTOP:
                    self.finish_writing()
                self.reached(f"at NFE {executed}")
                on_progress(executed)

            with (self.folder / "executions").open("a") as log:
                log.write(f"{job.id}\n")
            (card,) = (card for card in backend.students.values() if card.media_type == "video")
            asked = GenerationRequest(card.name, job.request["prompt"], job.request["seed"], 0, job.nfe, card.default_size)
            made = await backend.generate(asked, on_step=on_step)
            if self.signal == signal.SIGTERM:
                await asyncio.Event().wait()  # it is heard a little later than it is sent, and the job must not be quicker
            pixels = made.image.tobytes()
            facts = Facts(hashlib.sha256(pixels).hexdigest(), made.fingerprint, made.round_trip / 1e9, 0.0, {})
            return Result({"video": pixels}, facts)

        return make

    def reached(self, point: str) -> None:
        if point == self.point:
            os.kill(os.getpid(), self.signal)

    def finish_writing(self) -> None:
        """Waits for what other threads write, so that no SIGSTOP comes while one of them has SQLite's only lock."""
        with JobStore(self.url).database.writing():
            pass

    def place_points(self, store: JobStore) -> None:
        """Those that do not lie in `maker`."""
        here = threading.local()  # heartbeats commit too, on other threads

        def around(method: Callable[..., Any], what: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                here.point = f"before the {what} commits"
                result = method(*args)
                here.point = ""
                self.reached(f"after the {what} commits")
                return result

            return call

        def claim(worker: str) -> Lease | None:
            lease = JobStore.claim(store, worker)
            self.reached("at the lease" if lease else "")
            return lease

        def rename(source: Any, target: Any, replace: Callable[..., None] = os.replace) -> None:
            self.reached("before the file is renamed")
            replace(source, target)
            self.reached("after the file is renamed")

        event.listen(store.database.engine, "commit", lambda _: self.reached(getattr(here, "point", "")))
        changed = {"create": around(store.create, "insert"), "complete": around(store.complete, "update"), "claim": claim}
        vars(store).update(changed)
        os.replace = rename  # of this process alone

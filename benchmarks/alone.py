"""What a piece of work takes when it has a process to itself: seconds, and the most memory that was resident."""

import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Measured = dict[str, Any]
Stage = Callable[..., Measured]


def alone(stage: Stage, *arguments: Any) -> Measured:
    """Runs a stage in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, stage, *arguments).result()


def measured(stage: Stage, *arguments: Any) -> Measured:
    """What a stage found, with its seconds and bytes."""
    imported, begin = memory("VmHWM"), time.perf_counter()
    with own_peak() as peaks:
        found = stage(*arguments)
    seconds = round(time.perf_counter() - begin, 1)
    told = {"seconds": seconds, "peak_bytes": memory("VmHWM"), "peak_own_bytes": max(peaks), "import_bytes": imported}
    return told | found


def memory(name: str) -> int:
    """Resident bytes of this process: VmHWM, the most there were; RssAnon, those now that no file can give back."""
    (kibibytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kibibytes)


@contextmanager
def own_peak() -> Iterator[list[int]]:
    """Collects RssAnon every 20 ms while the block runs: the kernel keeps no mark of it."""
    seen, ended = [memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            seen.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()

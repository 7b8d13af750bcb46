"""The device lock: one at a time across processes, images before videos, free when its holder dies."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.engine.device import DeviceLock, Priority, priority_of
from server.engine.engine import Engine
from server.engine.errors import StudentError
from server.engine.request import Request, Result
from server.engine.scheduler import Scheduler
from tests.conftest import ROOT
from tests.fakes import Recorder
from tests.tiny_student import build_tiny_student
from tests.tiny_video import build_tiny_video

# Holds the device again and again for 30 ms and writes a line at each beginning and end.
LOOP = """
import sys, time
from pathlib import Path
from server.engine.device import DeviceLock, Priority
lock = DeviceLock("cpu", Priority(sys.argv[1]), Path(sys.argv[2]))
while True:
    with lock.held():
        print("begin", time.monotonic_ns(), flush=True)
        time.sleep(float(sys.argv[3]))
        print("end", time.monotonic_ns(), flush=True)
"""


def looping(folder: Path, priority: str, seconds: float = 0.03) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOOP, priority, str(folder), str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("begin")
    return process


def stamps(process: subprocess.Popen[str]) -> list[tuple[str, int]]:
    """What a killed process still had printed, (begin or end, nanoseconds), but the last line if it broke off in it."""
    lines = process.communicate()[0].splitlines(keepends=True)
    return [(line.split()[0], int(line.split()[1])) for line in lines if line.endswith("\n")]


def times(process: subprocess.Popen[str]) -> list[tuple[int, int]]:
    """(begin, end) of every complete hold but the first, whose beginning `looping` has read."""
    ordered = [stamp for _, stamp in stamps(process)[1:]]
    return list(zip(ordered[::2], ordered[1::2], strict=False))


def test_an_image_waits_for_at_most_one_nfe_of_a_video(tmp_path: Path) -> None:
    video = looping(tmp_path, "low")
    lock, waited = DeviceLock("cpu", Priority.HIGH, tmp_path), []
    for _ in range(20):
        asked = time.monotonic_ns()
        with lock.held():
            waited.append((asked, time.monotonic_ns()))
        time.sleep(0.01)
    video.kill()
    begun = [stamp for word, stamp in stamps(video) if word == "begin"]
    for asked, got in waited:
        assert sum(asked < time < got for time in begun) <= 1, "a second NFE of the video began while an image waited"


class Counted(DeviceLock):
    """Counts how often it has had the device."""

    count = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        with super().held():
            self.count += 1
            yield


@dataclass
class Guest(Recorder):
    """Somebody who waits for an image and notes how often a video has the device meanwhile."""

    video: Counted
    again: Callable[[], None]

    def __post_init__(self) -> None:
        super().__init__()
        self.before = self.video.count
        self.meanwhile = -1

    def done(self, result: Result) -> None:
        self.meanwhile = self.video.count - self.before
        super().done(result)
        self.again()


class Crowd:
    """Six people who want one image after another of a student, until there have been `most` and the video has gone on."""

    def __init__(self, folder: Path, locks: Path, video: Counted, most: int = 300) -> None:
        self.scheduler = Scheduler(Engine.open(folder), DeviceLock("cpu", Priority.HIGH, locks))
        self.video, self.most = video, most
        self.guests: list[Guest] = []
        self.busy, self.over = threading.Event(), threading.Event()
        for _ in range(6):
            self.ask()

    def ask(self) -> None:
        count = len(self.guests)
        if count < self.most or (self.video.count < 30 and count < 20_000):
            self.guests.append(Guest(self.video, self.ask))
            self.scheduler.submit(Request("a", count, 0, 1 + count % 4, "64x64"), self.guests[-1])
        else:
            self.over.set()
        if count > 12:
            self.busy.set()


@pytest.mark.parametrize("students", [1, 2])
def test_no_image_waits_for_more_than_one_nfe_or_chunk_of_videos_and_they_go_on(tmp_path: Path, students: int) -> None:
    lock = Counted("cpu", Priority.LOW, tmp_path)
    videos = Scheduler(Engine.open(build_tiny_video(tmp_path / "students")), lock)
    clips = [Recorder() for _ in range(100)]
    for seed, clip in enumerate(clips):
        videos.submit(Request("a", seed, 0, 2, "64x32"), clip)
    folder = build_tiny_student(tmp_path / "students")
    crowds = [Crowd(folder, tmp_path, lock) for _ in range(students)]
    threads = [crowd.scheduler.start() for crowd in crowds]
    assert all(crowd.busy.wait(60) for crowd in crowds)
    threads.append(videos.start())  # from here on there is always an image under way
    assert all(crowd.over.wait(120) for crowd in crowds)
    assert lock.count >= 30, "videos go on while images never end"
    for scheduler, thread in zip((*(crowd.scheduler for crowd in crowds), videos), threads, strict=True):
        scheduler.close()
        thread.join(60)
    guests = [guest for crowd in crowds for guest in crowd.guests]
    assert max(guest.meanwhile for guest in guests) <= 1
    assert all(isinstance(sink.answer, Result) for sink in (*guests, *clips))


def test_two_processes_never_hold_the_device_at_once(tmp_path: Path) -> None:
    processes = [looping(tmp_path, priority, 0.002) for priority in ("high", "low", "low")]
    time.sleep(0.5)
    for process in processes:
        process.kill()
    spans = sorted(span for process in processes for span in times(process))
    assert len(spans) > 20
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))


def test_two_locks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    first, second = (DeviceLock("cpu", Priority.HIGH, tmp_path) for _ in range(2))
    got = threading.Event()

    def take() -> None:
        with second.held():
            got.set()

    with first.held():
        thread = threading.Thread(target=take)
        thread.start()
        assert not got.wait(0.1)
    assert got.wait(10)
    thread.join()


@pytest.mark.parametrize("priority", ["high", "low"])
def test_a_killed_holder_gives_the_device_back(tmp_path: Path, priority: str) -> None:
    holder = looping(tmp_path, priority, 1000)
    os.kill(holder.pid, signal.SIGKILL)
    for waiter in Priority:
        with DeviceLock("cpu", waiter, tmp_path).held():
            pass
    holder.communicate()


def test_devices_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with DeviceLock("cpu", Priority.HIGH, tmp_path).held(), DeviceLock("cuda:0", Priority.HIGH, tmp_path).held():
        pass


def test_a_lock_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_LOCKS", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(StudentError, match="belongs to somebody else"):
        DeviceLock("cpu", Priority.HIGH)


def test_videos_give_way_to_images() -> None:
    assert (priority_of("image"), priority_of("video")) == (Priority.HIGH, Priority.LOW)

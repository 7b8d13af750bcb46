"""The contract: the same request has the same bits alone and in every company, and a harness that would notice."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks.determinism import MATES, SplitSumStep, Trials, control_of
from server.engine.device import DeviceLock, Priority
from server.engine.engine import Engine, batch_policy
from server.engine.request import Request, Result
from server.engine.scheduler import Scheduler
from tests.conftest import ROOT
from tests.fakes import Recorder
from tests.tiny_video import build_tiny_video

SHORT = ("a red circle", "a blue star")  # for students that read few tokens
HASHES = """
import sys
from hashlib import sha256
from pathlib import Path
from server.engine.engine import Engine
from server.engine.request import Request
engine = Engine.open(Path(sys.argv[1]))
for seed in range(3):
    print(sha256(engine.run(Request("a red circle", seed, 0, 2, sys.argv[2])).image.tobytes()).hexdigest())
"""


@pytest.fixture(scope="module")
def engine(bundled_repository: Path) -> Engine:
    return Engine.open(bundled_repository / "scenes")


@pytest.fixture(scope="module")
def miniature(video_repository: Path) -> Engine:
    """A CogVideoX student."""
    return Engine.open(video_repository / "cogvideox-2b")


@pytest.fixture(scope="module")
def tiny_video(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.open(build_tiny_video(tmp_path_factory.mktemp("repository")))


def test_company_changes_no_bit_whatever_its_size_slot_and_kind(engine: Engine) -> None:
    harness = Trials(engine, seed=1)
    assert not any(harness.differs(index) for index in range(3 * engine.max_batch))
    assert set(harness.mates) == set(MATES)


def test_company_changes_no_bit_of_a_video(miniature: Engine, tiny_video: Engine) -> None:
    harness = Trials(tiny_video, seed=1, prompts=SHORT)
    assert not any(harness.differs(index) for index in range(3 * tiny_video.max_batch))
    assert set(harness.mates) == set(MATES)
    harness = Trials(miniature, seed=1, prompts=SHORT)
    assert not any(harness.differs(index) for index in (1, 2, 6, 15))


def test_the_same_harness_catches_a_step_that_varies_with_the_batch(engine: Engine, tiny_video: Engine) -> None:
    for one, prompts in ((engine, SHORT), (tiny_video, SHORT)):
        control = Trials(control_of(one, "fast"), 1, prompts)
        assert any(control.differs(index) for index in range(one.max_batch))


def test_strict_gives_such_a_step_one_shape_and_with_it_the_same_bits(engine: Engine) -> None:
    strict = Trials(control_of(engine, "strict"), seed=1)
    assert not any(strict.differs(index) for index in range(engine.max_batch))


def test_the_batch_policy_is_part_of_the_fingerprint_where_it_matters(bundled_repository: Path, engine: Engine) -> None:
    fast = Engine.open(bundled_repository / "scenes", "fast")
    assert (engine.fingerprint_parts["batch_policy"], fast.fingerprint) == ("any", engine.fingerprint)
    varying = [SplitSumStep(engine.sessions["student_step"])]
    assert batch_policy(varying, "strict", 4) == ("fixed 4", 4)
    assert batch_policy(varying, "fast", 4) == ("fast", None)


def test_images_on_the_same_device_change_no_bit_of_a_video_nor_it_of_theirs(
    engine: Engine, miniature: Engine, tmp_path: Path
) -> None:
    requests = {
        Priority.LOW: (miniature, [Request("a red circle", seed, 0, 1 + seed % 4, "48x32") for seed in range(4)]),
        Priority.HIGH: (engine, [Request("a red circle", seed, 0, 1 + seed % 4, "128x128") for seed in range(24)]),
    }
    threads: list[threading.Thread] = []
    sinks: dict[Priority, list[Recorder]] = {}
    for priority, (student, asked) in requests.items():
        scheduler = Scheduler(student, DeviceLock("cpu", priority, tmp_path))
        sinks[priority] = [Recorder() for _ in asked]
        for request, sink in zip(asked, sinks[priority], strict=True):
            scheduler.submit(request, sink)
        scheduler.close()
        threads.append(threading.Thread(target=scheduler.run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for priority, (student, asked) in requests.items():
        for request, sink in zip(asked, sinks[priority], strict=True):
            assert isinstance(sink.answer, Result)
            assert np.array_equal(sink.answer.image, student.run(request).image)


@pytest.mark.parametrize(("student", "size"), [("cogvideox-2b", "48x32"), ("scenes", "128x128")])
def test_the_number_of_threads_changes_no_bit(video_repository: Path, student: str, size: str) -> None:
    folder = str(video_repository / student)
    said = {
        subprocess.run(
            [sys.executable, "-c", HASHES, folder, size],
            env=os.environ | {"FEWSTEP_CPU_THREADS": threads},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(said) == 1
    assert len(set(said.pop().split())) == 3

"""Fixtures shared by the tests of the server: students, what runs them in process, and the real server."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from server.gateway.inprocess_backend import InProcessBackend
from tests.tiny_student import build_tiny_student

# For torch, which reads it when it is imported: the tests' networks are so small that threads only wait for each other, ten
# times as long as one takes where the cores have other work too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Examples are the same in every run, so that a run goes red by a change alone; `HYPOTHESIS_PROFILE=default make test` looks
# for new ones. How long one takes is no property of ours.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Server:
    """A running `fewstep serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def children(self) -> list[int]:
        """Process ids of tritonserver and its stubs, tritonserver first."""
        found, waiting = [], [self.process.pid]
        while waiting:
            pid = waiting.pop()
            below = [
                int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
            ]
            found, waiting = found + below, waiting + below
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)


def start_server(repository: Path, backend: str = "triton", *flags: str, **environment: str) -> Server:
    """Starts `fewstep serve` on a free port and waits for its ready line. environment: variables besides those there are."""
    command = [sys.executable, str(ROOT / "fewstep.py"), "serve", "--port", "0"]
    command += ["--model-repository", str(repository), "--backend", backend, *flags]
    descriptor, log = tempfile.mkstemp(prefix="fewstep-test-", suffix=".log")  # a pipe that nobody reads would fill up
    with open(descriptor, "w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=os.environ | environment
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"http://[0-9.]+:[0-9]+", line)
    if match is None:
        process.wait(30)
        raise AssertionError(f"no ready line but {line!r}; {Path(log).read_text()}")
    return Server(process, match.group(), Path(log))


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with one small random student. Not to be changed."""
    repository = tmp_path_factory.mktemp("repository")
    build_tiny_student(repository)
    return repository


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name in tests/miniatures.py -> the folder of that pipeline, made when first asked for. Not to be changed."""
    from tests.miniatures import save_miniature  # imports diffusers: seconds that only some tests should pay

    folder = tmp_path_factory.mktemp("miniatures")
    return lambda name: folder / name if (folder / name).exists() else save_miniature(name, folder / name)


@pytest.fixture(scope="session")
def tiny_backend(tiny_repository: Path) -> Iterator[InProcessBackend]:
    """The small random student, run in this process. Not to be changed."""
    backend = InProcessBackend(tiny_repository)
    asyncio.run(backend.start())
    yield backend
    asyncio.run(backend.stop())


@pytest.fixture
def own_repository(tmp_path: Path) -> Path:
    """A small random student that the test may spoil."""
    build_tiny_student(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def bundled_repository() -> Path:
    """The repository that `fewstep serve` serves by default."""
    return ROOT / "model_repository"


@pytest.fixture(scope="session")
def triton_server(bundled_repository: Path) -> Iterator[Server]:
    """The bundled student behind the real Triton and the real gateway. Not to be killed."""
    server = start_server(bundled_repository)
    yield server
    assert server.stop() == 0

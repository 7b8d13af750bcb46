"""Fixtures shared by the tests of the server: students, what runs them in process, and the real server."""

import asyncio
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from hypothesis import settings

from server.gateway.inprocess_backend import InProcessBackend
from server.jobs.storage import Storage, open_storage
from server.jobs.store import JobStore
from tests.fakes import FakeClock
from tests.postgres import Postgres
from tests.tiny_student import build_tiny_student
from tests.tiny_video import build_tiny_video

if TYPE_CHECKING:  # only its own tests should pay for the import
    from playwright.sync_api import Browser

# For torch, which reads it when it is imported: the tests' networks are so small that threads only wait for each other, ten
# times as long as one takes where the cores have other work too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Device locks of this process's own: a video waits for every image on its device, also for those of the tests beside it and
# of other runs on this machine.
LOCKS = tempfile.TemporaryDirectory(prefix="fewstep-test-locks-")
os.environ["FEWSTEP_LOCKS"] = LOCKS.name

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
    """Starts `fewstep serve` on a free port and waits for its ready line. environment: variables besides those there are.
    Unless it says otherwise, video jobs are kept in a folder of this server's own."""
    environment = {"FEWSTEP_JOBS_FOLDER": tempfile.mkdtemp(prefix="fewstep-test-jobs-")} | environment
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


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Lets runs of precision=no have a process that has seen others: accelerate holds one precision for each."""
    from accelerate.state import AcceleratorState  # imports torch

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def video_repository(tmp_path_factory: pytest.TempPathFactory, bundled_repository: Path) -> Path:
    """A model repository with the bundled student and a miniature CogVideoX student with random weights: "cogvideox-2b", 17
    frames of 48x32 at 8 fps, 1 to 4 NFE, these on the grid of TDM's released student; beside it `student`, of which it was
    exported. Not to be changed. It takes half a minute; see tests/tiny_video.py for a student that takes none."""
    from export.publish import export_student
    from tests.miniatures import RELEASED_GRID, save_miniature_student

    folder = tmp_path_factory.mktemp("videos")
    export_student(save_miniature_student("cogvideox_2b", folder, timesteps=RELEASED_GRID), folder / "repository")
    shutil.copytree(bundled_repository / "scenes", folder / "repository" / "scenes")
    return folder / "repository"


@pytest.fixture(scope="session")
def video_backend(video_repository: Path) -> Iterator[InProcessBackend]:
    """The students of video_repository, run in this process. Not to be changed."""
    backend = InProcessBackend(video_repository)
    asyncio.run(backend.start())
    yield backend
    asyncio.run(backend.stop())


@pytest.fixture(scope="session")
def video_server(video_repository: Path) -> Iterator[Server]:
    """The students of video_repository behind the real Triton and the real gateway. Not to be killed."""
    server = start_server(video_repository)
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def clips_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with a small random student of images, "tiny", and one of videos, "tiny-video": 25 frames of 64x32 at
    8 fps, 1 to 4 NFE. Not to be changed."""
    repository = tmp_path_factory.mktemp("clips")
    build_tiny_student(repository)
    build_tiny_video(repository)
    return repository


@pytest.fixture(scope="session")
def clips_backend(clips_repository: Path) -> Iterator[InProcessBackend]:
    """The students of clips_repository, run in this process. Not to be changed."""
    backend = InProcessBackend(clips_repository)
    asyncio.run(backend.start())
    yield backend
    asyncio.run(backend.stop())


@pytest.fixture(scope="session")
def clips_server(clips_repository: Path) -> Iterator[Server]:
    """The students of clips_repository behind the real Triton and the real gateway. Not to be killed."""
    server = start_server(clips_repository)
    yield server
    assert server.stop() == 0


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
def served_repository() -> Path:
    """The repository that `fewstep serve` serves by default: the bundled students, of pictures and of videos."""
    return ROOT / "model_repository"


@pytest.fixture(scope="session")
def bundled_repository(served_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled student of pictures alone, for tests that have no use for the other. Not to be changed."""
    repository = tmp_path_factory.mktemp("bundled")
    shutil.copytree(served_repository / "scenes", repository / "scenes")
    return repository


@pytest.fixture(scope="session")
def triton_server(bundled_repository: Path) -> Iterator[Server]:
    """The bundled student of pictures behind the real Triton and the real gateway. Not to be killed."""
    server = start_server(bundled_repository)
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Debian's chromium. Of one module, since Playwright keeps an event loop running in this thread."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    assert chromium, "these tests need chromium: run `make chromium`"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real one, running."""
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def jobs_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database for jobs, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite"
    server: Postgres = request.getfixturevalue("postgres")
    return server.emptied()


@pytest.fixture(scope="session")
def s3() -> str:
    """The address of a server that speaks S3 and has a bucket named `clips`."""
    from moto.server import ThreadedMotoServer  # a second, which only some tests should pay

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()  # its threads end with this one; to stop it earlier would be to wait for connections that are kept
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    httpx.put(f"{url}/clips").raise_for_status()
    return url


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """An empty storage of files, of either kind."""
    if request.param == "folder":
        return open_storage(str(tmp_path / "files"))
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
    for name, value in (keys | {"AWS_ENDPOINT_URL": request.getfixturevalue("s3")}).items():
        monkeypatch.setenv(name, value)
    return open_storage(f"s3://clips/{secrets.token_hex(8)}")


@pytest.fixture
def clock() -> FakeClock:
    """Stands still at 0."""
    return FakeClock()


@pytest.fixture
def store(jobs_url: str, clock: FakeClock) -> Iterator[JobStore]:
    """An empty store by `clock`: leases of 10 s, 3 attempts, files for 100 s."""
    store = JobStore(jobs_url, lease_seconds=10, attempts=3, expiry_seconds=100, clock=clock)
    yield store
    store.close()

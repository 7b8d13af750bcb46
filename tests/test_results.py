"""Repeats are answered from the cache, equal requests in flight share one run, and who wants neither gets neither."""

import asyncio
import concurrent.futures
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from server.gateway.app import create_app
from server.gateway.backend import DeadlineExceeded, NumericalError
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.made import Made
from server.gateway.media import Encoded
from server.gateway.result_files import ResultFiles
from server.gateway.results import ENTRY_BYTES, Results
from server.gateway.settings import Settings

PATH = "/v1/images/generations"
BODY = {"prompt": "a red circle", "seed": 7}


@pytest.fixture
def client(tiny_backend: InProcessBackend) -> Iterator[TestClient]:
    with TestClient(create_app(tiny_backend, Settings())) as client:
        yield client


def executed(client: TestClient) -> float:
    backend: InProcessBackend = client.app.state.backend  # type: ignore[attr-defined]
    return backend.metrics["tiny"].total("fewstep_steps_executed_total")


def ask(client: TestClient, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    answer = client.post(PATH, json=BODY | changes, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_repeat_is_answered_without_work_and_says_so(client: TestClient) -> None:
    first = ask(client, num_inference_steps=3)
    before = executed(client)
    again = ask(client, num_inference_steps=3)
    assert executed(client) == before
    assert (first.headers["cache-status"], again.headers["cache-status"]) == ("fewstep; fwd=miss", "fewstep; hit")
    assert [answer.json()["data"][0]["cached"] for answer in (first, again)] == [False, True]
    assert again.json()["data"][0]["b64_json"] == first.json()["data"][0]["b64_json"]
    assert again.headers["x-pixel-sha256"] == first.headers["x-pixel-sha256"]
    assert again.json()["timings"]["steps"] == []
    assert again.json()["usage"] == first.json()["usage"]


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 8}, {"prompt": "b"}, {"num_inference_steps": 1}, {"size": "64x32"}, {"image_index": 1}),
        *({"output_format": "webp"}, {"embed_prompt": True}),
    ],
)
def test_whatever_decides_the_file_decides_the_key(client: TestClient, change: dict[str, Any]) -> None:
    ask(client)
    assert ask(client, **change).headers["cache-status"] == "fewstep; fwd=miss"


def test_an_image_of_several_is_known_alone_and_the_other_way_round(client: TestClient) -> None:
    ask(client, image_index=1)
    several = ask(client, n=3).json()["data"]
    assert [image["cached"] for image in several] == [False, True, False]
    assert ask(client, image_index=2).json()["data"][0]["b64_json"] == several[2]["b64_json"]


@pytest.mark.parametrize("directive", ["no-cache", "no-store", "max-age=0, No-Cache"])
def test_who_refuses_kept_answers_gets_work_done(client: TestClient, directive: str) -> None:
    ask(client)
    before = executed(client)
    assert ask(client, {"cache-control": directive}).headers["cache-status"] == "fewstep; fwd=request"
    assert executed(client) == before + 4


def test_what_must_not_be_stored_is_not(client: TestClient) -> None:
    ask(client, {"cache-control": "no-store"})
    assert ask(client).headers["cache-status"] == "fewstep; fwd=miss"


def test_without_a_seed_nothing_is_kept(client: TestClient) -> None:
    ask(client, seed=None)
    assert not client.app.state.pipeline.results.memory  # type: ignore[attr-defined]


def test_a_stream_is_answered_from_the_cache_with_its_last_event_alone(client: TestClient) -> None:
    ask(client)
    before = executed(client)
    text = client.post(PATH, json=BODY | {"stream": True, "partial_images": 3}).text
    assert (text.count("event:"), text.count("image_generation.completed")) == (1, 2)
    assert '"cached":true' in text
    assert executed(client) == before


def test_a_stream_fills_the_cache(client: TestClient) -> None:
    client.post(PATH, json=BODY | {"stream": True, "partial_images": 3})
    assert ask(client).headers["cache-status"] == "fewstep; hit"


def test_the_switch_turns_it_off(tiny_backend: InProcessBackend) -> None:
    with TestClient(create_app(tiny_backend, Settings(result_cache=False))) as client:
        before = executed(client)
        assert [ask(client).headers["cache-status"] for _ in range(2)] == ["fewstep; fwd=miss"] * 2
        assert executed(client) - before == 2 * 4


def test_results_on_disk_outlive_the_server(tiny_backend: InProcessBackend, tmp_path: Path) -> None:
    settings = Settings(result_cache_folder=tmp_path / "results", result_cache_disk_mb=1)
    with TestClient(create_app(tiny_backend, settings)) as client:
        first = ask(client)
        until(lambda: len(list((tmp_path / "results").glob("*.result"))) == 1)
    with TestClient(create_app(tiny_backend, settings)) as client:
        again = ask(client)
        assert again.headers["cache-status"] == "fewstep; hit"
        assert again.json()["data"][0]["b64_json"] == first.json()["data"][0]["b64_json"]


def test_equal_requests_at_once_are_executed_once(client: TestClient) -> None:
    before = executed(client)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: ask(client, seed=99), range(16)))
    assert executed(client) == before + 4
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 1
    assert sum(answer.headers["cache-status"] == "fewstep; fwd=miss" for answer in answers) == 1


# --- flights, on an event loop of the test's own --------------------------------------------------------------------------


def made(content: bytes = b"file") -> Made:
    return Made(0, Encoded(content, 5), "sha", 4, "fp", {"nfe1": 3}, 9)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


class Execution:
    """Work that ends when it is told to."""

    def __init__(self) -> None:
        self.begun, self.cancelled = 0, 0
        self.outcome: asyncio.Future[Made] = asyncio.get_running_loop().create_future()

    async def __call__(self) -> Made:
        self.begun += 1
        try:
            return await asyncio.shield(self.outcome)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@asynccontextmanager
async def two_waiting(results: Results, execution: Execution, seconds: float = 60) -> AsyncIterator[list[Any]]:
    deadline = time.monotonic() + seconds
    waiting = [asyncio.create_task(results.share("k", deadline, execution)) for _ in range(2)]
    await asyncio.sleep(0.01)
    yield waiting
    await asyncio.gather(*waiting, return_exceptions=True)


def test_one_who_leaves_does_not_stop_the_other() -> None:
    async def scenario() -> None:
        results, execution = Results(10**6), Execution()
        async with two_waiting(results, execution) as (first, second):
            first.cancel()
            await asyncio.sleep(0.01)
            execution.outcome.set_result(made())
            assert (await second).origin == "shared"
        assert (execution.begun, execution.cancelled, results.flights) == (1, 0, {})

    asyncio.run(scenario())


def test_the_last_who_leaves_stops_the_work_and_the_next_begins_anew() -> None:
    async def scenario() -> None:
        results, execution = Results(10**6), Execution()
        async with two_waiting(results, execution) as waiting:
            for one in waiting:
                one.cancel()
        late = asyncio.create_task(results.share("k", time.monotonic() + 60, execution))
        await asyncio.sleep(0.01)
        assert (execution.begun, execution.cancelled) == (2, 1)
        execution.outcome.set_result(made())
        assert (await late).origin == "made"

    asyncio.run(scenario())


def test_a_failure_is_told_to_all_and_kept_for_nobody() -> None:
    async def scenario() -> None:
        results, execution = Results(10**6), Execution()
        async with two_waiting(results, execution) as waiting:
            execution.outcome.set_exception(NumericalError("no"))
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [NumericalError, NumericalError]
        assert results.flights == {}

    asyncio.run(scenario())


def test_the_first_one_s_deadline_does_not_fail_the_second() -> None:
    async def scenario() -> None:
        results, execution, again = Results(10**6), Execution(), Execution()
        first = asyncio.create_task(results.share("k", time.monotonic() + 0.05, execution))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(results.share("k", time.monotonic() + 60, again))
        await asyncio.sleep(0.01)
        execution.outcome.set_exception(DeadlineExceeded("passed"))
        again.outcome.set_result(made())
        with pytest.raises(DeadlineExceeded):
            await first
        assert (await second).file.content == b"file"
        assert (execution.begun, again.begun) == (1, 1)

    asyncio.run(scenario())


def test_who_joins_with_little_time_does_not_wait_longer() -> None:
    async def scenario() -> None:
        results, execution = Results(10**6), Execution()
        first = asyncio.create_task(results.share("k", time.monotonic() + 60, execution))
        await asyncio.sleep(0.01)
        with pytest.raises(DeadlineExceeded):
            await results.share("k", time.monotonic() + 0.05, execution)
        execution.outcome.set_result(made())
        assert (await first).origin == "made"

    asyncio.run(scenario())


def test_memory_is_bounded_and_keeps_what_was_used_last() -> None:
    async def scenario() -> list[bool]:
        results = Results(3 * (1000 + ENTRY_BYTES))
        for key in "abc":
            results.keep(key, made(bytes(1000)))
        await results.find("a", 0)
        results.keep("d", made(bytes(1000)))
        results.keep("huge", made(bytes(10**6)))
        return [bool(await results.find(key, 0)) for key in ("a", "b", "c", "d", "huge")]

    assert asyncio.run(scenario()) == [True, False, True, True, False]


# --- the disk -------------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path, 10**6)
    files.write("k", made(b"two\nlines"))
    read = files.read("k", 3)
    assert read is not None
    assert (read.image_index, read.file.content, read.pixel_sha256, read.tokens, read.fingerprint) == (
        *(3, b"two\nlines", "sha", 4, "fp"),
    )
    assert files.read("other", 0) is None


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-1], lambda text: b"{}\n" + text, lambda text: b"", lambda text: b"\xff\n"]
)
def test_a_damaged_file_is_no_result(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    files = ResultFiles(tmp_path, 10**6)
    files.write("k", made())
    (path,) = files.files()
    path.write_bytes(damage(path.read_bytes()))
    assert files.read("k", 0) is None


def test_the_folder_is_bounded_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path, 10_000)
    for index in range(20):
        files.write(f"k{index}", made(bytes(1000)))
        files.read("k0", 0)
        time.sleep(0.002)
        assert sum(file.stat().st_size for file in files.files()) <= 10_000
    assert files.read("k0", 0)
    assert files.read("k19", 0)
    assert files.read("k1", 0) is None
    assert ResultFiles(tmp_path, 10_000).used == sum(file.stat().st_size for file in files.files())


def test_a_folder_that_cannot_be_written_costs_no_answer(tmp_path: Path) -> None:
    files = ResultFiles(tmp_path / "gone", 10**6)
    (tmp_path / "gone").rmdir()
    files.write("k", made())
    assert files.read("k", 0) is None

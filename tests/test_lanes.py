"""A bounded number of one key's images is with the backend, and no place is ever lost."""

import asyncio
import dataclasses
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.student import open_student
from server.engine.triton_config import student_parameters
from server.gateway.backend import DeadlineExceeded, StudentCard
from server.gateway.lanes import Lanes
from server.gateway.plan import Plan, make_plan
from server.gateway.schemas import ImageGeneration


@pytest.fixture(scope="module")
def plan(tiny_repository: Path) -> Plan:
    card = StudentCard.parse(student_parameters(open_student(tiny_repository / "tiny").manifest))
    return make_plan("a", ImageGeneration(prompt="a"), {}, {"tiny": card}, 60_000)


def of(plan: Plan, who: str = "a", nfe: int = 4, seconds: float = 60.0) -> Plan:
    return dataclasses.replace(plan, who=who, nfe=nfe, deadline=time.monotonic() + seconds)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.none() | st.integers(0, 5)), max_size=20),
    st.integers(1, 3),
)
def test_never_more_than_the_bound_are_inside_and_all_get_in_who_stay(
    plan: Plan, visits: list[tuple[str, int, int | None]], most: int
) -> None:
    """visits: whose, for how many turns of the event loop inside, and after how many turns cancelled."""
    lanes, inside, served = Lanes(most), {"a": 0, "b": 0}, 0

    async def visit(who: str, turns: int) -> None:
        nonlocal served
        async with lanes.place(of(plan, who)):
            inside[who] += 1
            assert inside[who] <= most
            try:
                for _ in range(turns):
                    await asyncio.sleep(0)
            finally:
                inside[who] -= 1
        served += 1

    async def scenario() -> None:
        tasks = [asyncio.create_task(visit(who, turns)) for who, turns, _ in visits]
        for turn in range(6):
            for task, (_, _, cancelled_at) in zip(tasks, visits, strict=True):
                if cancelled_at == turn:
                    task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert not [task for task in tasks if not task.cancelled() and task.exception()]

    asyncio.run(scenario())
    assert served >= sum(cancelled_at is None for _, _, cancelled_at in visits)
    assert not lanes.lanes


def test_places_go_to_the_most_urgent_and_to_the_shortest_by_turns(plan: Plan) -> None:
    lanes, order = Lanes(1), []

    async def visit(name: str, own: Plan) -> None:
        async with lanes.place(own):
            order.append(name)
            await asyncio.sleep(0)

    async def scenario() -> None:
        longs = [visit(f"long {index}", of(plan, seconds=60 + index)) for index in range(4)]
        shorts = [visit(f"short {index}", of(plan, nfe=1, seconds=90 + index)) for index in range(2)]
        await asyncio.gather(*longs, *shorts, visit("urgent", of(plan, seconds=30)))

    asyncio.run(scenario())
    assert order == ["long 0", "urgent", "short 0", "long 1", "short 1", "long 2", "long 3"]


def test_another_key_never_waits(plan: Plan) -> None:
    lanes = Lanes(1)

    async def scenario() -> None:
        async with lanes.place(of(plan, "flood")):
            waiting = asyncio.create_task(lanes.place(of(plan, "flood")).__aenter__())
            await asyncio.sleep(0)
            async with asyncio.timeout(5), lanes.place(of(plan, "other")):
                assert not waiting.done()
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting

    asyncio.run(scenario())


def test_a_deadline_that_passes_here_is_a_passed_deadline(plan: Plan) -> None:
    lanes = Lanes(1)

    async def scenario() -> None:
        async with lanes.place(of(plan)):
            with pytest.raises(DeadlineExceeded):
                async with lanes.place(of(plan, seconds=0.01)):
                    raise AssertionError("there was no place")
            assert not lanes.lanes["a"].waiting

    asyncio.run(scenario())

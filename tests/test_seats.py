"""Who goes first: keys share the seats of every batch, and one that floods is no burden to the others."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine import seats as seats_module
from server.engine.device import FreeDevice
from server.engine.member import Member
from server.engine.metrics import MemoryMetrics
from server.engine.request import Progress, Request
from server.engine.scheduler import Scheduler
from server.engine.seats import TURN, Seats, flooding
from tests.fakes import FakeClock, FakeDecoder, FakeStep, Recorder, fake_engine
from tests.tiny_student import build_tiny_student

NUMBERS = itertools.count()


def member(who: str, nfe: int = 4, width: int = 8, probe: bool = False) -> Member:
    """A request that has had no NFE yet; who comes later is less urgent."""
    request = Request("a", 0, 0, nfe, "64x64", probe=probe, who=who)
    latents = np.zeros((1, 4, 8, width), np.float32)
    nothing: Any = None
    progress = Progress(request, nothing, nothing, latents, latents, [])
    return Member(progress, Recorder(), 60.0, next(NUMBERS), 0.0, MemoryMetrics())


def whose(batch: list[Member]) -> Counter[str]:
    return Counter(member.who for member in batch)


@given(
    waiting=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 4)), min_size=1, max_size=40),
    seats=st.integers(1, 16),
    floods=st.frozensets(st.sampled_from("ab")),
)
def test_seats_are_shared_evenly_among_the_keys_that_wait(
    waiting: list[tuple[str, int]], seats: int, floods: frozenset[str]
) -> None:
    candidates = [member(who, nfe) for who, nfe in waiting]
    dealer, left = Seats(), candidates
    while left:
        batch = dealer.deal(left, seats, floods)
        assert 0 < len(batch) <= seats
        assert len(set(map(id, batch))) == len(batch)
        wait, got = whose(left), whose(batch)
        poorest = min((got[who] for who in wait if who not in floods and got[who] < wait[who]), default=seats)
        beyond = sum(max(got[who] - poorest - 1, 0) for who in got)
        assert beyond <= 1, "the seat that is kept for the shortest"
        left = [one for one in left if one not in batch]


def test_within_a_key_the_most_urgent_go_first_and_a_seat_is_kept_for_the_shortest() -> None:
    candidates = [member("a") for _ in range(6)] + [member("a", nfe=1)]
    assert Seats().deal(candidates, 4) == [*candidates[:3], candidates[6]]


def test_the_only_seat_goes_round() -> None:
    candidates = [member(who) for who in "aaab"]
    dealer, order = Seats(), []
    while candidates:
        (one,) = dealer.deal(candidates, 1)
        order.append(one.who)
        candidates.remove(one)
    assert sorted(order[:3]) == ["a", "a", "b"]


def test_the_sizes_of_two_keys_take_turns() -> None:
    dealer, candidates = Seats(), [member("a") for _ in range(9)] + [member("b", width=4)]
    assert set(whose(dealer.deal(candidates, 4))) == {"a"}
    assert set(whose(dealer.deal(candidates, 4))) == {"b"}


def test_a_key_floods_with_more_than_two_batches_under_way() -> None:
    members = [member("a") for _ in range(8)] + [member("b") for _ in range(9)]
    assert flooding(members, 4) == {"b"}


def test_a_key_that_floods_has_all_seats_while_it_is_alone() -> None:
    candidates = [member("flood") for _ in range(40)]
    assert whose(Seats().deal(candidates, 16, {"flood"})) == {"flood": 16}


def test_a_key_that_floods_waits_for_the_others_but_not_for_ever() -> None:
    dealer, candidates = Seats(), [member("flood") for _ in range(40)] + [member("a"), member("b")]
    batches = [whose(dealer.deal(candidates, 16, {"flood"})) for _ in range(3 * TURN)]
    assert all(batch["a"] == batch["b"] == 1 for batch in batches)
    assert [batch["flood"] for batch in batches[TURN - 1 :: TURN]] == [2, 2, 2]
    assert sum(batch["flood"] for batch in batches) == 3 * 2


def test_a_key_that_floods_leaves_seats_empty_while_others_have_been_there_lately() -> None:
    dealer, flood = Seats(), [member("flood") for _ in range(40)]
    dealer.deal([member("a"), member("b")], 16)
    assert whose(dealer.deal(flood, 16, {"flood"})) == {"flood": 2}
    later = [whose(dealer.deal(flood, 16, {"flood"}))["flood"] for _ in range(seats_module.LATELY)]
    assert later[-1] == 16


def test_keys_that_flood_share_all_seats_while_nobody_else_is_there() -> None:
    dealer, floods = Seats(), [member(who) for who in "ab" for _ in range(40)]
    dealer.deal([member("c", probe=True)], 16)
    assert whose(dealer.deal(floods, 16, {"a", "b"})) == {"a": 8, "b": 8}, "who asks for the server itself is not counted"


def test_nobody_waits_for_the_decodes_of_a_key_that_floods(tmp_path: Path) -> None:
    scheduler = Scheduler(fake_engine(build_tiny_student(tmp_path), FakeClock(), 4), FreeDevice(), MemoryMetrics())
    polite, flood, done = [member("a")], [member("flood")], [member("flood") for _ in range(9)]
    turns = [scheduler.decodes_next(polite, done, {"flood"}) for _ in range(2 * TURN)]
    assert [turn for turn, decodes in enumerate(turns, 1) if decodes] == [TURN, 2 * TURN], "but not for ever"
    assert scheduler.decodes_next(flood, [member("a")], {"flood"}), "nor for its NFEs"
    scheduler.runner.just_decoded = True
    assert not scheduler.decodes_next(polite, [member("b")], {"flood"}), "the others take turns"
    assert scheduler.decodes_next([], done, {"flood"})


# --- a whole second of everybody's, on a clock that moves only when the networks run ---------------------------------------


class Step(FakeStep):
    """As long as an NFE of the bundled student takes on one core, by rows."""

    def run(self, tensors: Any) -> list[Any]:
        began, outputs = self.clock.now, super().run(tensors)
        self.clock.now = began + 0.0019 + 0.00146 * len(tensors["latents"])
        return outputs


class Decoder(FakeDecoder):
    """As long as a decode takes."""

    def run(self, tensors: Any) -> list[Any]:
        began, outputs = self.clock.now, super().run(tensors)
        self.clock.now = began + 0.001 + 0.0051 * len(tensors["latents"])
        return outputs


class Timed(Recorder):
    """Keeps how long the answer took."""

    def __init__(self, clock: FakeClock, arrived: float, seconds: list[float]) -> None:
        super().__init__()
        self.done = lambda _: seconds.append(clock.now - arrived)  # type: ignore[method-assign]


def others_p95(tiny: Path, load: float, flood: int) -> float:
    """Seconds, of four keys that ask for `load` images/s between them, while a fifth always has `flood` requests waiting or,
    where that is 0, asks for as much as each of them."""
    clock, taken = FakeClock(), []
    engine = fake_engine(tiny, clock, 16)
    engine.sessions.update(student_step=Step(clock), vae_decoder=Decoder(clock, 8))
    scheduler, rng, seconds = Scheduler(engine, FreeDevice(), clock=clock), np.random.default_rng(1), 8.0
    keys = ["a", "b", "c", "d"] + ([] if flood else ["e"])
    times = {who: np.cumsum(rng.exponential(4 / load, round(load / 4 * seconds))).tolist() for who in keys}
    arrivals = sorted((time, who) for who in keys for time in times[who])

    def submit(arrived: float, who: str, into: list[float]) -> None:
        scheduler.submit(Request("a", 1, 0, 4, "64x64", who=who), Timed(clock, arrived, into))

    while arrivals:
        while arrivals and arrivals[0][0] <= clock.now:
            arrived, who = arrivals.pop(0)
            submit(arrived, who, taken if who != "e" else [])
        under_way = [*scheduler.members, *scheduler.arrivals]
        for _ in range(flood - sum(one.who == "flood" for one in under_way)):
            submit(clock.now, "flood", [])
        if scheduler.members or scheduler.arrivals:
            scheduler.tick()
        else:
            clock.now = arrivals[0][0]
    return float(np.percentile(taken, 95))


@pytest.mark.parametrize("load", [35.0, 55.0])
def test_a_key_that_floods_moves_the_p95_of_the_others_by_less_than_a_fifth(
    tmp_path_factory: pytest.TempPathFactory, load: float
) -> None:
    tiny = build_tiny_student(tmp_path_factory.mktemp("repository"))
    assert others_p95(tiny, load, flood=100) < 1.2 * others_p95(tiny, load, flood=0)

"""Work is taken in while it can be done in time, refused at once with an honest Retry-After, and never leaks."""

import asyncio
import dataclasses
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.student import open_student
from server.engine.triton_config import student_parameters
from server.gateway.admission import Admission, Cost, Ticket
from server.gateway.app import create_app
from server.gateway.backend import Generated, Span, StudentCard
from server.gateway.errors import ApiError
from server.gateway.inprocess_backend import InProcessBackend
from server.gateway.plan import Plan, make_plan
from server.gateway.schemas import ImageGeneration
from server.gateway.settings import Settings


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def card(tiny_repository: Path) -> StudentCard:
    return StudentCard.parse(student_parameters(open_student(tiny_repository / "tiny").manifest))


@pytest.fixture
def plan(card: StudentCard) -> Plan:
    """4 NFE: one second of work in `office`, due in a minute."""
    made = make_plan("a", ImageGeneration(prompt="a", seed=1), {}, {"tiny": card}, 60_000)
    return dataclasses.replace(made, deadline=Clock.now + 60)


def office(limit: float = 10.0, share: float = 1.0) -> Admission:
    admission = Admission(limit, share, Clock())
    admission.costs["tiny", "64x64"] = Cost(nfe=0.2, image=0.2)
    return admission


def refused(admission: Admission, plan: Plan, who: str = "a", images: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught, admission.admitted(of(who, plan), images):
        pass
    return caught.value


def of(who: str, plan: Plan) -> Plan:
    """The same plan of another key."""
    return dataclasses.replace(plan, who=who)


def test_exactly_full_plus_one_is_one_refusal(plan: Plan) -> None:
    admission = office(limit=10)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(admission.admitted(plan, 1))
        error = refused(admission, plan)
        assert (error.status, error.code) == (503, "overloaded")
    assert not admission.tickets


def test_retry_after_is_when_there_is_room_again(plan: Plan) -> None:
    admission = office(limit=10)
    with admission.admitted(plan, 8):
        headers = refused(admission, plan, images=5).headers
    assert headers == {"Retry-After": "3", "retry-after-ms": "3000"}


def test_a_key_that_has_its_share_is_told_so_and_others_are_not_affected(plan: Plan) -> None:
    admission = office(limit=10, share=0.5)
    with admission.admitted(of("flood", plan), 5):
        assert refused(admission, plan, "flood").status == 429
        with admission.admitted(of("other", plan), 5):
            assert refused(admission, plan, "third").status == 503


def test_one_key_s_flood_fills_its_share_and_costs_no_other_key_a_request(plan: Plan) -> None:
    admission = office(limit=10, share=0.5)
    with ExitStack() as stack:
        counts: Counter[tuple[str, int]] = Counter()
        for arrival in range(1000):
            who = f"other {arrival % 3}" if arrival % 250 == 249 else "flood"
            try:
                stack.enter_context(admission.admitted(of(who, plan), 1))
                counts[who, 200] += 1
            except ApiError as error:
                counts[who, error.status] += 1
    assert counts == {("flood", 200): 5, ("flood", 429): 991, ("other 0", 200): 2, ("other 1", 200): 1, ("other 2", 200): 1}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 100), st.booleans())))
def test_the_backlog_is_that_of_the_tickets_whatever_comes_and_goes(events: list[tuple[str, float, bool]]) -> None:
    admission, held = office(), []
    for who, seconds, comes in events:
        if comes or not held:
            held.append(Ticket(who, round(seconds * 1e9), 0.0))
            admission.take(held[-1])
        else:
            admission.give_back(held.pop(0))
        assert admission.total == sum(ticket.nanoseconds for ticket in held)
        assert +admission.backlog == +sum((Counter({t.who: t.nanoseconds}) for t in held), Counter())


def test_work_that_is_alone_is_taken_in_however_long_it_is(plan: Plan) -> None:
    admission = office(limit=1, share=0.5)
    with admission.admitted(plan, 10):
        assert admission.tickets


def test_a_deadline_that_cannot_be_met_is_refused_on_arrival(plan: Plan) -> None:
    admission = office(limit=100)
    urgent = dataclasses.replace(plan, deadline=Clock.now + 5)
    with admission.admitted(urgent, 5):
        error = refused(admission, urgent)
        assert (error.status, error.code, error.headers) == (
            *(503, "deadline_unreachable", {"Retry-After": "1", "retry-after-ms": "1000"}),
        )


def test_the_urgent_overtake_so_later_deadlines_do_not_count_against_them(plan: Plan) -> None:
    admission = office(limit=100)
    urgent = dataclasses.replace(plan, deadline=Clock.now + 5)
    with admission.admitted(plan, 30), admission.admitted(urgent, 1):
        assert len(admission.tickets) == 2


def test_what_is_known_already_needs_no_room(plan: Plan) -> None:
    admission = office(limit=1)
    with admission.admitted(plan, 1), admission.admitted(plan, 0):
        assert len(admission.tickets) == 1


def test_room_is_given_back_whatever_happens(plan: Plan) -> None:
    admission = office()
    with pytest.raises(RuntimeError), admission.admitted(plan, 1):
        raise RuntimeError
    assert not admission.tickets


def test_costs_are_learned_as_each_row_s_share_of_its_batch(plan: Plan) -> None:
    admission = office()
    spans = (*(Span(f"nfe{step}", 0, 400_000_000, 4) for step in range(1, 5)), Span("vae_decoder", 0, 600_000_000, 2))
    image: Any = Generated(np.zeros((64, 64, 3), np.uint8), spans, 4, "fp", {}, 0)
    for _ in range(100):
        admission.learn(plan, image)
    assert admission.predict(plan, 2) == pytest.approx(2 * (4 * 0.1 + 0.3), rel=0.01)


def test_a_full_server_refuses_before_it_reads(plan: Plan) -> None:
    admission = office(limit=10)
    admission.check_room("a")
    with admission.admitted(plan, 9):
        admission.check_room("a")
        with admission.admitted(plan, 1), pytest.raises(ApiError) as caught:
            admission.check_room("b")
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    admission.check_room("b")


def test_the_body_of_a_refused_request_is_not_read(tiny_repository: Path) -> None:
    backend = InProcessBackend(tiny_repository)
    app = create_app(backend, Settings())
    admission: Admission = app.state.pipeline.admission
    admission.limit_seconds = 1.0
    admission.take(Ticket("somebody", 5 * 10**9, time.monotonic() + 60))
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/v1/images/generations"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"retry-after"] == b"4"


def test_work_that_waits_elsewhere_counts_for_all_and_for_its_key(plan: Plan) -> None:
    admission = office(limit=4.0, share=0.5)
    elsewhere = {"a": 10**9, "b": 10**9}
    with admission.admitted(plan, 1, elsewhere), pytest.raises(ApiError) as caught, admission.admitted(plan, 1, elsewhere):
        pass
    assert (caught.value.status, caught.value.code) == (429, "queue_share"), "a second here, a second there, and one more"
    with pytest.raises(ApiError) as full, admission.admitted(of("c", plan), 1, elsewhere | {"b": 3 * 10**9}):
        pass
    assert (full.value.status, full.value.code) == (503, "overloaded")
    assert admission.total == 0

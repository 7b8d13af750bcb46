"""Who listens hears everything from then on, in order, and the last prediction of before."""

import asyncio

import numpy as np

from server.gateway.broadcast import Broadcast, Executed, Happened, Partial

FRAMES = np.zeros((1, 2, 2, 3), np.uint8)


def heard(ear: "asyncio.Queue[Happened]") -> list[Happened]:
    return [ear.get_nowait() for _ in range(ear.qsize())]


def test_every_listener_hears_its_own_job_in_order() -> None:
    broadcast = Broadcast()
    with broadcast.listening("a") as first, broadcast.listening("a") as second, broadcast.listening("b") as other:
        with broadcast.making("a"):
            broadcast.tell("a", Executed(1))
            broadcast.tell("a", Partial(1, FRAMES))
        assert heard(first) == heard(second) == [Executed(0), Executed(1), Partial(1, FRAMES)]
        assert heard(other) == []


def test_a_late_listener_hears_the_last_prediction_while_the_job_is_being_made() -> None:
    broadcast = Broadcast()
    with broadcast.making("a"):
        broadcast.tell("a", Partial(1, FRAMES))
        broadcast.tell("a", Partial(3, FRAMES))
        with broadcast.listening("a") as late:
            assert heard(late) == [Partial(3, FRAMES)]
    with broadcast.listening("a") as later:
        assert heard(later) == []


def test_nothing_is_kept_for_nobody() -> None:
    broadcast = Broadcast()
    with broadcast.making("a"), broadcast.listening("a"):
        broadcast.tell("a", Partial(1, FRAMES))
    broadcast.tell("a", Executed(2))
    assert not broadcast.ears
    assert not broadcast.partials

"""The NFE scheduler: properties over random schedules, with networks and a clock that are fakes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.device import FreeDevice
from server.engine.engine import Engine
from server.engine.errors import Cancelled, DeadlineExceeded, EngineError, InvalidRequest, NumericalError, ShuttingDown
from server.engine.metrics import MemoryMetrics
from server.engine.request import Request, Result
from server.engine.scheduler import Scheduler
from server.engine.session import Session, Tensors
from tests.fakes import NAN_SEED, RAISING_SEED, FakeClock, FakeEngine, Recorder, fake_engine
from tests.tiny_student import build_tiny_student
from tests.tiny_video import build_tiny_video


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_student(tmp_path_factory.mktemp("repository"))


class Stage:
    """A scheduler on fakes, worked by hand."""

    def __init__(self, tiny: Path, max_batch: int = 4, fixed_batch: int | None = None) -> None:
        self.clock, self.metrics = FakeClock(), MemoryMetrics()
        self.engine: FakeEngine = fake_engine(tiny, self.clock, max_batch, fixed_batch)
        self.scheduler = Scheduler(self.engine, FreeDevice(), self.metrics, self.clock)
        self.steps = self.engine.sessions["student_step"]
        self.decoder = self.engine.sessions["vae_decoder"]

    def submit(self, seed: int, nfe: int = 4, seconds: float | None = None, **changes: object) -> Recorder:
        sink = Recorder()
        values = {"prompt": "a", "image_index": 0, "size": "64x64"} | changes
        self.scheduler.submit(Request(seed=seed, nfe=nfe, **values), sink, seconds)  # type: ignore[arg-type]
        return sink

    def finish(self, ticks: int = 1000) -> None:
        for _ in range(ticks):
            if not (self.scheduler.arrivals or self.scheduler.members):
                return
            self.scheduler.tick()
        raise AssertionError(f"not done after {ticks} ticks")


@dataclass(frozen=True)
class Planned:
    """One request of a random schedule; times are ticks, seconds are of the fake clock."""

    arrives: int
    nfe: int
    size: str
    spoiled: int | None  # NAN_SEED or RAISING_SEED
    seconds: float | None
    cancelled_after: int | None
    previews: frozenset[int] = field(default=frozenset())


requests = st.builds(
    Planned,
    arrives=st.integers(0, 12),
    nfe=st.integers(1, 4),
    size=st.sampled_from(["64x64", "64x64", "64x32"]),
    spoiled=st.sampled_from([None, None, None, None, NAN_SEED, RAISING_SEED]),
    seconds=st.none() | st.floats(0, 30),
    cancelled_after=st.none() | st.integers(0, 12),
    previews=st.frozensets(st.integers(1, 3), max_size=3),
)


@given(schedule=st.lists(requests, min_size=1, max_size=12), max_batch=st.integers(1, 4))
def test_every_request_of_any_schedule_gets_exactly_what_it_asked_for_once(
    tiny: Path, schedule: list[Planned], max_batch: int
) -> None:
    stage = Stage(tiny, max_batch)
    sinks: dict[int, Recorder] = {}
    ended: dict[int, float] = {}
    for tick in range(1000):
        for index, planned in enumerate(schedule):
            if planned.arrives == tick:
                seed = planned.spoiled or 1000 + index
                previews = tuple(sorted(step for step in planned.previews if step < planned.nfe))
                sinks[index] = stage.submit(seed, planned.nfe, planned.seconds, size=planned.size, previews=previews)
                if planned.seconds is not None:
                    ended[index] = stage.clock.now + planned.seconds
            if planned.cancelled_after is not None and tick >= planned.arrives + planned.cancelled_after:
                sinks[index].wanted = False
        if tick > 12 and not (stage.scheduler.arrivals or stage.scheduler.members):
            break
        stage.scheduler.tick()
    assert len(sinks) == len(schedule)
    for index, planned in enumerate(schedule):
        answer, seed = sinks[index].answer, planned.spoiled or 1000 + index
        executed = sum(call.count(seed) for call in stage.steps.calls)
        previews = [step for step, _ in sinks[index].previews]
        asked = sorted(step for step in planned.previews if step < planned.nfe)
        if isinstance(answer, Result):
            assert planned.spoiled is None
            assert executed == planned.nfe, "NFE is a contract"
            assert previews == asked
            assert np.array_equal(answer.image, alone(tiny, seed, planned))
        else:
            assert planned.spoiled or isinstance(answer, Cancelled | DeadlineExceeded)
            assert previews == asked[: len(previews)]
        if index in ended and not planned.spoiled:
            begun = [began for began, call in zip(stage.steps.began, stage.steps.calls, strict=False) if seed in call]
            assert RAISING_SEED in [p.spoiled for p in schedule] or all(time < ended[index] for time in begun)
    assert stage.metrics.total("fewstep_finished_total") == len(schedule)
    assert stage.metrics.total("fewstep_cancelled_total") == sum(isinstance(sink.answer, Cancelled) for sink in sinks.values())
    good = sum(len(call) - call.count(NAN_SEED) for call in stage.steps.calls)
    assert stage.metrics.total("fewstep_steps_executed_total") == good


def alone(tiny: Path, seed: int, planned: Planned) -> np.ndarray:
    stage = Stage(tiny)
    sink = stage.submit(seed, planned.nfe, size=planned.size)
    stage.finish()
    assert isinstance(sink.answer, Result)
    return sink.answer.image


def test_a_batch_holds_members_at_different_steps_and_with_different_nfe(tiny: Path) -> None:
    stage = Stage(tiny)
    stage.submit(1, nfe=4)
    stage.scheduler.tick()
    stage.submit(2, nfe=2)
    stage.finish()
    assert stage.steps.calls == [[1], [1, 2], [1, 2], [1]]


def test_a_one_nfe_request_waits_at_most_one_nfe_of_a_full_batch(tiny: Path) -> None:
    stage = Stage(tiny, max_batch=4)
    for seed in range(10, 22):
        stage.submit(seed, nfe=4)
    stage.scheduler.tick()
    late = stage.submit(1, nfe=1)
    stage.scheduler.tick()
    assert 1 in stage.steps.calls[1]
    stage.scheduler.tick()
    assert isinstance(late.answer, Result)


@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_a_flood_of_one_nfe_requests_starves_no_four_nfe_request(tiny: Path, max_batch: int) -> None:
    stage = Stage(tiny, max_batch)
    for seed in range(10, 10 + max_batch):
        stage.submit(seed, nfe=1)
    long = stage.submit(1, nfe=4)
    for seed in range(100, 200):
        for extra in range(max_batch):
            stage.submit(1000 * seed + extra, nfe=1)
        stage.scheduler.tick()
        if long.answers:
            break
    assert isinstance(long.answer, Result)
    assert sum(1 in call for call in stage.steps.calls) == 4
    assert len(stage.steps.calls) <= 2 * 4 + 2


@pytest.mark.parametrize("max_batch", [1, 2])
def test_a_flood_of_four_nfe_requests_starves_no_one_nfe_request(tiny: Path, max_batch: int) -> None:
    stage = Stage(tiny, max_batch)
    for seed in range(10, 30):
        stage.submit(seed, nfe=4)
    stage.scheduler.tick()
    short = [stage.submit(seed, nfe=1) for seed in (1, 2, 3)]
    while not all(sink.answers for sink in short):
        stage.scheduler.tick()
    assert len(stage.steps.calls) <= 1 + 2 * 3 + 1


def test_the_earliest_deadline_goes_first_and_then_the_earliest_arrival(tiny: Path) -> None:
    stage = Stage(tiny, max_batch=1)
    for seed, seconds in ((1, None), (2, 50.0), (3, 20.0), (4, None)):
        stage.submit(seed, nfe=1, seconds=seconds)
    stage.finish()
    assert [call[0] for call in stage.steps.calls] == [3, 2, 1, 4]


def test_the_most_urgent_size_is_served_and_the_other_sizes_follow(tiny: Path) -> None:
    stage = Stage(tiny)
    for seed, size in ((1, "64x64"), (2, "64x32"), (3, "64x64")):
        stage.submit(seed, nfe=1, size=size)
    stage.finish()
    assert stage.steps.calls == [[1, 3], [2]]


def test_no_nfe_runs_after_a_cancellation_and_the_mates_go_on(tiny: Path) -> None:
    stage = Stage(tiny)
    gone, mate = stage.submit(1), stage.submit(2)
    stage.scheduler.tick()
    gone.wanted = False
    stage.finish()
    assert isinstance(gone.answer, Cancelled)
    assert stage.steps.calls == [[1, 2], [2], [2], [2]]
    assert isinstance(mate.answer, Result)
    assert stage.metrics.values["fewstep_cancelled_total", (("at", "nfe1"),)] == 1


def test_who_is_cancelled_in_the_queue_runs_no_nfe_and_their_seat_is_for_others(tiny: Path) -> None:
    stage = Stage(tiny, max_batch=2)
    first, gone, last = (stage.submit(seed, nfe=1) for seed in (1, 2, 3))
    gone.wanted = False
    stage.finish()
    assert isinstance(gone.answer, Cancelled)
    assert stage.steps.calls == [[1, 3]]
    assert isinstance(first.answer, Result)
    assert isinstance(last.answer, Result)
    assert stage.metrics.values["fewstep_cancelled_total", (("at", "queue"),)] == 1


def test_nobody_is_asked_whether_they_are_cancelled_but_who_would_be_worked_on(tiny: Path) -> None:
    stage = Stage(tiny, max_batch=4)
    sinks = [stage.submit(seed) for seed in range(1, 21)]
    stage.scheduler.tick()
    assert [sink.asked for sink in sinks] == [1] * 4 + [0] * 16


def test_a_passed_deadline_stops_between_two_nfes_and_says_where(tiny: Path) -> None:
    stage = Stage(tiny)
    late = stage.submit(1, nfe=4, seconds=1.5)
    stage.finish()
    assert isinstance(late.answer, DeadlineExceeded)
    assert "2 of 4 NFEs" in str(late.answer)
    assert len(stage.steps.calls) == 2


def test_previews_are_decoded_for_those_who_asked_and_for_nobody_else(tiny: Path) -> None:
    stage = Stage(tiny)
    asked, other = stage.submit(1, previews=(1, 3)), stage.submit(2)
    stage.finish()
    assert [step for step, _ in asked.previews] == [1, 3]
    assert not other.previews
    assert stage.metrics.total("fewstep_previews_total") == 2
    assert stage.metrics.values["fewstep_batch_size_sum", (("stage", "vae_decoder"),)] == 4


def test_executed_nfes_are_told_to_those_who_asked_and_cost_no_decode(tiny: Path) -> None:
    stage = Stage(tiny)
    asked, other = stage.submit(1, tells_steps=True), stage.submit(2, nfe=2)
    stage.scheduler.tick()
    assert asked.steps == [1], "told when it is executed, and not in the end"
    stage.finish()
    assert (asked.steps, other.steps) == ([1, 2, 3, 4], [])
    assert stage.metrics.values["fewstep_batch_size_sum", (("stage", "vae_decoder"),)] == 2


def test_nan_fails_its_own_request_alone(tiny: Path) -> None:
    stage = Stage(tiny)
    bad, good = stage.submit(NAN_SEED), stage.submit(2)
    stage.finish()
    assert isinstance(bad.answer, NumericalError)
    assert isinstance(good.answer, Result)
    assert sum(call.count(NAN_SEED) for call in stage.steps.calls) == 1


def test_a_member_that_raises_does_not_take_its_batch_along(tiny: Path) -> None:
    stage = Stage(tiny)
    good, bad, other = stage.submit(1), stage.submit(RAISING_SEED), stage.submit(2)
    stage.finish()
    assert "RuntimeError" in str(bad.answer)
    assert isinstance(bad.answer, EngineError)
    assert isinstance(good.answer, Result)
    assert isinstance(other.answer, Result)
    assert stage.metrics.total("fewstep_steps_executed_total") == 8


def test_a_sink_that_raises_harms_nobody(tiny: Path) -> None:
    stage = Stage(tiny)
    rude, polite = stage.submit(1, previews=(1,)), stage.submit(2)

    def refuse(*said: object) -> None:
        raise RuntimeError("no")

    rude.preview = rude.done = refuse  # type: ignore[method-assign]
    stage.finish()
    assert isinstance(polite.answer, Result)


def test_a_fixed_batch_gives_every_step_one_shape(tiny: Path) -> None:
    stage = Stage(tiny, fixed_batch=3)
    for seed in (1, 2, 3, 4):
        stage.submit(seed, nfe=2)
    stage.finish()
    assert {len(call) for call in stage.steps.calls} == {3}


def test_equal_prompts_are_encoded_once_and_the_cache_is_bounded(tiny: Path) -> None:
    stage = Stage(tiny)
    stage.engine.text_encoder.capacity = 2
    encoder = stage.engine.sessions["text_encoder"]
    for prompt in ("a", "a", "red", "a"):
        stage.submit(1, prompt=prompt)
    assert encoder.calls == 2
    stage.submit(1, prompt="blue")
    assert len(stage.engine.text_encoder.cache) == 2
    stage.submit(1, prompt="red")
    assert encoder.calls == 4


def test_what_cannot_be_run_is_refused_on_the_caller_s_thread(tiny: Path) -> None:
    stage = Stage(tiny)
    with pytest.raises(InvalidRequest):
        stage.submit(1, nfe=5)
    with pytest.raises(InvalidRequest, match="previews must be after NFE 1 to 3"):
        stage.submit(1, previews=(4,))
    assert not stage.scheduler.arrivals


def test_closing_drains_and_then_refuses(tiny: Path) -> None:
    stage = Stage(tiny)
    sinks = [stage.submit(seed) for seed in range(1, 9)]
    thread = stage.scheduler.start()
    stage.scheduler.close()
    thread.join(30)
    assert not thread.is_alive()
    assert all(isinstance(sink.answer, Result) for sink in sinks)
    with pytest.raises(ShuttingDown):
        stage.submit(9)


def test_the_loop_survives_a_tick_that_raises(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tiny)
    deal, broken = stage.scheduler.step_seats.deal, [True]

    def once(*arguments: object, **named: object) -> object:
        if broken.pop() if broken else False:
            raise RuntimeError("a bug of our own")
        return deal(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(stage.scheduler.step_seats, "deal", once)
    first = stage.submit(1)
    thread = stage.scheduler.start()
    while not first.answers:
        pass
    assert "a bug of our own" in str(first.answer)
    second = stage.submit(2)
    stage.scheduler.close()
    thread.join(30)
    assert isinstance(second.answer, Result)


def test_many_threads_submit_and_none_is_lost_or_doubled(tiny_repository: Path) -> None:
    engine = Engine.open(tiny_repository / "tiny")
    expected = {seed: engine.run(Request("a", seed, 0, 1 + seed % 4, "64x64")).image for seed in range(32)}
    scheduler = Scheduler(Engine.open(tiny_repository / "tiny"), FreeDevice())
    loop = scheduler.start()
    sinks = {seed: Recorder() for seed in range(32)}

    def submit(seeds: range) -> None:
        for seed in seeds:
            scheduler.submit(Request("a", seed, 0, 1 + seed % 4, "64x64"), sinks[seed])

    threads = [threading.Thread(target=submit, args=(range(first, 32, 8),)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.close()
    loop.join(30)
    for seed, sink in sinks.items():
        assert isinstance(sink.answer, Result)
        assert np.array_equal(sink.answer.image, expected[seed])


class Worked(FreeDevice):
    """A device that notes what holds it: `work` has "step" or "chunk" for every hold, in order."""

    def __init__(self, engine: Engine) -> None:
        self.work: list[str] = []
        self.inside = False
        for graph, session in engine.sessions.items():
            engine.sessions[graph] = Noted(self, graph, session)

    @contextmanager
    def held(self) -> Iterator[None]:
        self.inside, before = True, len(self.work)
        yield
        self.inside = False
        assert len(self.work) == before + 1, "one piece of work for every hold"


@dataclass
class Noted:
    """A session that tells its device when it runs."""

    device: Worked
    graph: str
    session: Session
    batch_invariant = True

    def run(self, tensors: Tensors) -> list[Any]:
        if self.graph != "text_encoder":
            assert self.device.inside, "work without the device"
            self.device.work.append("step" if self.graph == "student_step" else "chunk")
        return self.session.run(tensors)


class Videos:
    """A scheduler over the tiny student of videos (3 chunks: 9, 8 and 8 frames), worked by hand."""

    def __init__(self, folder: Path) -> None:
        self.alone = Engine.open(build_tiny_video(folder))
        self.engine = Engine.open(folder / "tiny-video")
        self.device, self.metrics = Worked(self.engine), MemoryMetrics()
        self.scheduler = Scheduler(self.engine, self.device, self.metrics)

    def submit(self, seed: int, nfe: int = 2, **changes: Any) -> Recorder:
        sink = Recorder()
        self.scheduler.submit(Request("a", seed, 0, nfe, "64x32", **changes), sink)
        return sink

    def image(self, seed: int, nfe: int = 2) -> np.ndarray:
        """What the request makes alone."""
        return self.alone.run(Request("a", seed, 0, nfe, "64x32")).image

    def tick(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.tick()


@pytest.fixture
def videos(tmp_path: Path) -> Videos:
    return Videos(tmp_path)


def test_a_video_holds_the_device_for_one_nfe_or_one_chunk_at_a_time(videos: Videos) -> None:
    sink = videos.submit(1)
    videos.tick(5)
    assert videos.device.work == ["step", "step", "chunk", "chunk", "chunk"]
    assert isinstance(sink.answer, Result)
    assert np.array_equal(sink.answer.image, videos.image(1))
    assert [span.stage for span in sink.answer.spans][2:] == ["nfe1", "nfe2", "vae_decoder"]


def test_the_chunks_of_a_video_and_the_nfes_of_others_take_turns(videos: Videos) -> None:
    first = videos.submit(1)
    videos.tick(2)
    second = videos.submit(2, nfe=4)
    videos.tick(6)
    assert videos.device.work[2:] in (["chunk", "step"] * 3, ["step", "chunk"] * 3)
    videos.tick(4)
    for sink, seed, nfe in ((first, 1, 2), (second, 2, 4)):
        assert isinstance(sink.answer, Result)
        assert np.array_equal(sink.answer.image, videos.image(seed, nfe))


def test_a_video_that_has_begun_is_decoded_to_its_end_before_another_begins(videos: Videos) -> None:
    sinks = [videos.submit(seed) for seed in (1, 2, 3)]
    begun = set()
    for _ in range(20):
        videos.tick(1)
        clips = [member for member in videos.scheduler.members if member.clip]
        assert len(clips) <= 1, "of the state of a video there is one at a time"
        begun |= set(clips)
    assert len(begun) == 3
    for sink, seed in zip(sinks, (1, 2, 3), strict=True):
        assert isinstance(sink.answer, Result)
        assert np.array_equal(sink.answer.image, videos.image(seed))


def test_a_preview_of_a_video_is_its_first_chunk_and_changes_no_pixel(videos: Videos) -> None:
    sink = videos.submit(1, nfe=3, previews=(1, 2))
    videos.tick(3 + 2 + 3)
    assert [(step, image.shape) for step, image in sink.previews] == [(1, (9, 32, 64, 3)), (2, (9, 32, 64, 3))]
    assert isinstance(sink.answer, Result)
    assert np.array_equal(sink.answer.image, videos.image(1, 3))
    assert videos.device.work.count("chunk") == 2 + 3, "a preview costs one chunk"
    assert videos.metrics.total("fewstep_previews_total") == 2


def test_a_video_that_nobody_wants_any_more_ends_between_two_chunks(videos: Videos) -> None:
    gone, other = videos.submit(1), videos.submit(2)
    videos.tick(3)
    gone.wanted = False
    videos.tick(10)
    assert isinstance(gone.answer, Cancelled)
    assert videos.device.work == ["step", "step", *["chunk"] * (1 + 3)]
    assert isinstance(other.answer, Result)
    assert np.array_equal(other.answer.image, videos.image(2))


def test_a_chunk_that_raises_fails_its_own_video_alone(videos: Videos) -> None:
    bad, good = videos.submit(1), videos.submit(2)
    videos.tick(3)
    (member,) = [member for member in videos.scheduler.members if member.clip]
    assert member.clip
    member.clip.state = np.zeros((1, 1, 1), np.float32)
    videos.tick(10)
    assert isinstance(bad.answer, EngineError)
    assert isinstance(good.answer, Result)
    assert np.array_equal(good.answer.image, videos.image(2))

"""The contract: the same request has the same bits alone and in every company, and a harness that would notice."""

from pathlib import Path

import pytest

from benchmarks.determinism import MATES, BlasStep, Trials, control_of
from server.engine.engine import Engine, batch_policy


@pytest.fixture(scope="module")
def engine(bundled_repository: Path) -> Engine:
    return Engine.open(bundled_repository / "scenes")


def test_company_changes_no_bit_whatever_its_size_slot_and_kind(engine: Engine) -> None:
    harness = Trials(engine, seed=1)
    assert not any(harness.differs(index) for index in range(3 * engine.max_batch))
    assert set(harness.mates) == set(MATES)


def test_the_same_harness_catches_a_step_that_varies_with_the_batch(engine: Engine) -> None:
    control = Trials(control_of(engine, "fast"), seed=1)
    assert any(control.differs(index) for index in range(engine.max_batch))


def test_strict_gives_such_a_step_one_shape_and_with_it_the_same_bits(engine: Engine) -> None:
    strict = Trials(control_of(engine, "strict"), seed=1)
    assert not any(strict.differs(index) for index in range(engine.max_batch))


def test_the_batch_policy_is_part_of_the_fingerprint_where_it_matters(bundled_repository: Path, engine: Engine) -> None:
    fast = Engine.open(bundled_repository / "scenes", "fast")
    assert (engine.fingerprint_parts["batch_policy"], fast.fingerprint) == ("any", engine.fingerprint)
    varying = [BlasStep(engine.sessions["student_step"])]
    assert batch_policy(varying, "strict", 4) == ("fixed 4", 4)
    assert batch_policy(varying, "fast", 4) == ("fast", None)

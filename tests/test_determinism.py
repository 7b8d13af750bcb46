"""The contract: the same request has the same bits alone and in every company, and a harness that would notice."""

from pathlib import Path

import pytest

from benchmarks.determinism import MATES, Trials, control_of
from server.engine.engine import Engine


@pytest.fixture(scope="module")
def engine(bundled_repository: Path) -> Engine:
    return Engine.open(bundled_repository / "scenes")


def test_company_changes_no_bit_whatever_its_size_slot_and_kind(engine: Engine) -> None:
    harness = Trials(engine, seed=1)
    assert not any(harness.differs(index) for index in range(3 * engine.max_batch))
    assert set(harness.mates) == set(MATES)


def test_the_same_harness_catches_a_step_that_varies_with_the_batch(engine: Engine) -> None:
    control = Trials(control_of(engine), seed=1)
    assert any(control.differs(index) for index in range(engine.max_batch))

"""Pictures from the running server are read by the evaluator as what their prompts said."""

import numpy as np
import pytest

from benchmarks.evaluate import Evaluation, caller, server_rows
from tests.conftest import Server

ADHERENCE_AT_LEAST = {1: 0.53, 4: 0.75}  # three standard errors (60 captions) below what 500 give, see the README


@pytest.mark.slow
def test_the_served_student_draws_what_held_out_captions_say(triton_server: Server) -> None:
    evaluation = Evaluation(60, seed=0)
    rows = {row.nfe: row for row in server_rows(caller(triton_server.url, None), list(ADHERENCE_AT_LEAST), evaluation)}
    for nfe, least in ADHERENCE_AT_LEAST.items():
        assert rows[nfe].adherence >= least, rows[nfe]
    swapped = np.roll(rows[4].pictures, 1, axis=0)
    assert evaluation.row("swapped", 0, 1.0, lambda part: swapped[part]).adherence < 0.2, "the evaluator must notice"

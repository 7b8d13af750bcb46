"""What the bundled students make is read by the evaluators as what the prompts said."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.evaluate import SceneEvaluation, caller, server_rows
from benchmarks.evaluate_video import VideoEvaluation, VideoTeacher
from benchmarks.evaluation import student_rows
from tests.conftest import Server

ADHERENCE_AT_LEAST = {1: 0.53, 4: 0.75}  # three standard errors (60 captions) below what 500 give, see the README
CLIPS_AT_LEAST = {1: 0.55, 4: 0.73}  # the same for clips, 40 captions


@pytest.mark.slow
def test_the_served_student_draws_what_held_out_captions_say(triton_server: Server) -> None:
    evaluation = SceneEvaluation(60, seed=0)
    rows = {row.nfe: row for row in server_rows(caller(triton_server.url, None), list(ADHERENCE_AT_LEAST), evaluation)}
    for nfe, least in ADHERENCE_AT_LEAST.items():
        assert rows[nfe].adherence >= least, rows[nfe]
    swapped = np.roll(rows[4].pictures, 1, axis=0)
    assert evaluation.row("swapped", 0, 1.0, lambda part: swapped[part]).adherence < 0.2, "the evaluator must notice"


@pytest.mark.slow
def test_the_bundled_student_of_videos_shows_what_held_out_captions_say(served_repository: Path) -> None:
    evaluation = VideoEvaluation(40, seed=0, reference=range(150))
    made = student_rows(
        served_repository / "motion", list(CLIPS_AT_LEAST), evaluation, lambda folder: VideoTeacher(folder, evaluation)
    )
    rows = {row.nfe: row for row in made}
    for nfe, least in CLIPS_AT_LEAST.items():
        assert rows[nfe].adherence >= least, rows[nfe]
    swapped = np.roll(rows[4].pictures, 1, axis=0)
    assert evaluation.row("swapped", 0, 1.0, lambda part: swapped[part]).adherence < 0.2, "the evaluator must notice"

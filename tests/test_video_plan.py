"""What a student of videos can make is planned, and nothing else."""

import dataclasses
from typing import Any

import pytest

from server.gateway.errors import ApiError
from server.gateway.schemas import VideoGeneration
from server.gateway.video_plan import VideoPlan, body_sha256, duration, plan_video, planned
from tests.fakes import MOTION

SCENES = dataclasses.replace(MOTION, name="scenes", media_type="image", frames=None, fps=None)
STUDENTS = {"scenes": SCENES, "motion": MOTION}


def plan(**fields: Any) -> VideoPlan:
    return plan_video("somebody", VideoGeneration(**({"prompt": "a"} | fields)), STUDENTS)


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        plan(**fields)
    return caught.value


def test_what_is_left_out_is_filled_in() -> None:
    made = plan()
    assert (made.student, made.nfe, made.size, made.frames, made.fps, made.seconds) == (MOTION, 4, "64x48", 16, 8, "2")
    assert plan().seed != made.seed


@pytest.mark.parametrize("seconds", ["2", "2.0", "2.000", 2, 2.0, "02", 2.0004, "1.9996"])
def test_seconds_may_be_text_or_a_number_and_are_meant_to_the_millisecond(seconds: Any) -> None:
    assert plan(seconds=seconds, fps=8, num_frames=16).seconds == "2"


@pytest.mark.parametrize("seconds", ["4", 8, "2.001", 1.999, 0, -2, "", "two", "2s", " 2", "1e300", 1e300, "2" * 999, "٢"])
def test_other_seconds_are_refused_with_those_that_are_legal(seconds: Any) -> None:
    error = refused(seconds=seconds)
    assert (error.status, error.param) == (400, "seconds")
    assert "2 (16 frames at 8 per second)" in error.message


@pytest.mark.parametrize(
    ("frames", "fps", "said"), [(16, 8, "2"), (49, 8, "6.125"), (49, 24, "2.042"), (160, 8, "20"), (1, 3, "0.333")]
)
def test_a_length_is_told_to_the_millisecond_and_accepted_as_it_is_told(frames: int, fps: int, said: str) -> None:
    student = dataclasses.replace(MOTION, frames=frames, fps=fps)
    assert duration(student) == said
    for seconds in (said, float(said), frames / fps):
        assert plan_video("", VideoGeneration(prompt="a", seconds=seconds), {"motion": student}).seconds == said


@pytest.mark.parametrize(
    ("field", "value", "legal"),
    [
        ("fps", 24, "8"),
        ("fps", 0, "8"),
        ("num_frames", 49, "16"),
        ("num_frames", -1, "16"),
        ("size", "1280x720", "64x48"),
        ("num_inference_steps", 3, "1, 2, 4"),
        ("steps", 50, "1, 2, 4"),
        ("prompt", " ", "1 to 100"),
        ("prompt", "a" * 101, "1 to 100"),
        ("guidance_scale", 7.5, "only 1"),
        ("negative_prompt", "blurry", "leave it empty"),
        ("model", "scenes", "motion"),
    ],
)
def test_what_the_student_cannot_make_is_refused_with_what_it_can(field: str, value: Any, legal: str) -> None:
    error = refused(**{field: value})
    assert (error.status, error.param) == (400, field)
    assert legal in error.message


def test_without_a_student_of_videos_nothing_is_found() -> None:
    for name in (None, "scenes"):
        with pytest.raises(ApiError, match="no student that makes videos is served here, only scenes") as caught:
            plan_video("", VideoGeneration(prompt="a", model=name), {"scenes": SCENES})
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert refused(model="sora-2").code == "model_not_found"


def test_a_plan_survives_as_a_document() -> None:
    made = plan(steps=4, partial_images=2, seed=2**64 - 1)
    assert made.previews == (1, 3)
    assert planned("somebody", made.document(), STUDENTS) == made


def test_a_kept_plan_whose_student_has_changed_is_refused() -> None:
    kept = plan(steps=4).document()
    with pytest.raises(ApiError, match="num_inference_steps must be one of 1, 2"):
        planned("somebody", kept, {"motion": dataclasses.replace(MOTION, nfe=(1, 2))})
    with pytest.raises(ApiError, match=r"seconds must be 6\.125"):
        planned("somebody", kept, {"motion": dataclasses.replace(MOTION, frames=49)})
    with pytest.raises(ApiError, match="'motion' is not served"):
        planned("somebody", kept, {"other": MOTION})


def test_equal_requests_are_one_body_and_others_another() -> None:
    first = body_sha256(VideoGeneration(prompt="a", seed=7, seconds=None))
    assert first == body_sha256(VideoGeneration(seed=7, prompt="a"))
    assert first != body_sha256(VideoGeneration(prompt="a", seed=8))

"""One request through the engine: what is asked is what is run, and the same request gives the same bits."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engine.engine import Engine
from server.engine.errors import InvalidRequest, NumericalError, StudentError
from server.engine.request import Request
from server.engine.session import OnnxSession, Tensors, cpu_threads
from server.engine.student import GraphTensors, open_student
from tests.tiny_student import LENGTH, build_tiny_student

DECODER = GraphTensors(("latents",), ("image",))


@pytest.fixture(scope="module")
def engine(tiny_repository: Path) -> Engine:
    return Engine.open(tiny_repository / "tiny")


def request(**changes: Any) -> Request:
    return Request(**{"prompt": "a red circle", "seed": 7, "image_index": 0, "nfe": 4, "size": "64x64"} | changes)


class CountingSession:
    """Passes calls on and keeps what it was given."""

    batch_invariant = True

    def __init__(self, session: Any) -> None:
        self.session, self.calls = session, []

    def run(self, tensors: Tensors) -> Any:
        self.calls.append(tensors)
        return self.session.run(tensors)


@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
def test_exactly_the_asked_evaluations_run_with_the_rows_of_their_table(tiny_repository: Path, nfe: int) -> None:
    engine = Engine.open(tiny_repository / "tiny")
    counting = engine.sessions["student_step"] = CountingSession(engine.sessions["student_step"])
    result = engine.run(request(nfe=nfe))
    rows = [[*call["timestep"], *call["coefficients"][0]] for call in counting.calls]
    np.testing.assert_allclose(rows, engine.manifest.tables[str(nfe)], rtol=1e-6)
    assert {int(call["nfe"][0]) for call in counting.calls} == {nfe}
    assert [stage for stage in result.nanoseconds if stage.startswith("nfe")] == [f"nfe{i + 1}" for i in range(nfe)]


def test_the_first_step_sees_no_previous_x0_and_the_next_ones_do(tiny_repository: Path) -> None:
    engine = Engine.open(tiny_repository / "tiny")
    counting = engine.sessions["student_step"] = CountingSession(engine.sessions["student_step"])
    engine.run(request(nfe=2))
    first, second = counting.calls
    assert not first["x0_prev"].any()
    assert second["x0_prev"].any()


def test_size_is_width_by_height(engine: Engine) -> None:
    assert engine.run(request(size="64x32")).image.shape == (32, 64, 3)


def test_the_same_request_gives_the_same_bits_in_another_engine(engine: Engine, tiny_repository: Path) -> None:
    other = Engine.open(tiny_repository / "tiny")
    assert np.array_equal(engine.run(request()).image, other.run(request()).image)
    assert engine.fingerprint == other.fingerprint


@pytest.mark.parametrize("changes", [{"seed": 8}, {"image_index": 1}, {"nfe": 3}, {"prompt": "a blue circle"}])
def test_every_part_of_a_request_counts(engine: Engine, changes: dict[str, Any]) -> None:
    assert not np.array_equal(engine.run(request()).image, engine.run(request(**changes)).image)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": "a" * 101}, "prompt"),
        ({"prompt": "a " * LENGTH}, "prompt"),
        ({"prompt": "a \ud800"}, "prompt"),
        ({"nfe": 0}, "nfe"),
        ({"nfe": 5}, "nfe"),
        ({"size": "65x64"}, "size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"image_index": 2**32}, "image_index"),
    ],
)
def test_what_the_student_cannot_do_is_refused_by_name(engine: Engine, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.run(request(**changes))
    assert caught.value.param == param


def test_a_prompt_of_exactly_the_text_length_is_accepted(engine: Engine) -> None:
    assert engine.run(request(prompt="a " * (LENGTH - 1))).tokens == LENGTH


def test_a_network_that_gives_nan_makes_no_image(tmp_path: Path) -> None:
    engine = Engine.open(build_tiny_student(tmp_path, poisoned=True))
    with pytest.raises(NumericalError):
        engine.run(request(nfe=2))
    assert engine.run(request(nfe=1)).image.shape == (64, 64, 3)


def test_an_output_of_the_wrong_shape_makes_no_image(tiny_repository: Path) -> None:
    engine = Engine.open(tiny_repository / "tiny")

    class Short:
        def run(self, tensors: Tensors) -> Any:
            return [tensors["latents"][..., :1], tensors["latents"][..., :1]]

    engine.sessions["student_step"] = Short()
    with pytest.raises(NumericalError):
        engine.run(request())


def test_a_graph_that_lacks_an_input_is_refused_by_name(tiny_repository: Path) -> None:
    student = open_student(tiny_repository / "tiny")
    with pytest.raises(StudentError, match="lacks coefficients"):
        OnnxSession("student_step", student.files["vae_decoder.onnx"], student.manifest.tensors("student_step"))


@pytest.mark.parametrize(("contents", "said"), [(b"not a graph", "no ONNX file"), (b"", "onnxruntime refuses it")])
def test_bytes_that_are_no_graph_are_refused_in_one_line(contents: bytes, said: str) -> None:
    with pytest.raises(StudentError, match=said) as caught:
        OnnxSession("vae_decoder", contents, DECODER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("told", ["0", "-1", "two", "1.5", "9999"])
def test_an_illegal_number_of_threads_is_named(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("FEWSTEP_CPU_THREADS", told)
    with pytest.raises(StudentError, match=r"FEWSTEP_CPU_THREADS.*" + re.escape(told)):
        cpu_threads()


def test_threads_are_half_of_the_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_CPU_THREADS", raising=False)
    assert 1 <= cpu_threads() <= max(1, (os.cpu_count() or 1) // 2)
    monkeypatch.setenv("FEWSTEP_CPU_THREADS", "3")
    assert cpu_threads() == 3

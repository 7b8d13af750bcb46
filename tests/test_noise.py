"""Seeds decide the noise, and nothing else does."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.noise import initial_latents, log, normals, philox, sine_cosine

SEEDS = st.integers(0, 2**64 - 1)
INDICES = st.integers(0, 2**32 - 1)

# Known-answer vectors of Random123: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_gives_the_published_vectors(counter: str, key: str, result: str) -> None:
    low, high = words(key)
    assert philox(np.array([words(counter)], np.uint32), (low, high)).tolist() == [words(result)]


def test_the_noise_of_a_seed_never_changes() -> None:
    drawn = normals(7, 0, 512)
    assert drawn[:4].tolist() == pytest.approx([2.9156741e-04, -3.0484697e-01, 1.7887573, 1.0678725], rel=1e-6)
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == GOLDEN


@given(SEEDS, INDICES, st.integers(1, 40), st.integers(0, 40))
def test_a_longer_draw_begins_with_the_shorter_one(seed: int, index: int, count: int, more: int) -> None:
    assert np.array_equal(normals(seed, index, count + more)[:count], normals(seed, index, count))


@given(SEEDS, INDICES)
def test_seeds_and_image_indices_all_count(seed: int, index: int) -> None:
    drawn = normals(seed, index, 8)
    assert not np.array_equal(drawn, normals(seed ^ (1 << 63), index, 8))
    assert not np.array_equal(drawn, normals(seed ^ 1, index, 8))
    assert not np.array_equal(drawn, normals(seed, index ^ 1, 8))
    assert drawn.dtype == np.float32
    assert np.isfinite(drawn).all()


def test_noise_is_standard_normal() -> None:
    drawn = np.concatenate([normals(seed, 0, 4096) for seed in range(50)]).astype(np.float64)
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.std() - 1) < 0.01
    assert abs((drawn**4).mean() - 3) < 0.1
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01


def test_latents_are_scaled_to_the_student_s_noise_level() -> None:
    assert np.array_equal(initial_latents(3, 1, (4, 2, 2), 2.0), 2 * normals(3, 1, 16).reshape(4, 2, 2))


def test_the_series_agree_with_the_library() -> None:
    x = np.array([2.0**-32, 1e-3, 0.3, 0.7071, 0.999999, 1.0])
    np.testing.assert_allclose(log(x), np.log(x), rtol=1e-15, atol=1e-16)
    word = np.random.default_rng(0).integers(0, 2**32, 10_000, dtype=np.uint32)
    sine, cosine = sine_cosine(word)
    angle = word * (2 * np.pi / 2**32)
    np.testing.assert_allclose(sine, np.sin(angle), atol=2e-15)
    np.testing.assert_allclose(cosine, np.cos(angle), atol=2e-15)


GOLDEN = "14d3398849ab40716762c07945e742131d895e9d47fcfb2c4e02fa47594d7eb5"

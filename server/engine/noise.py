"""Seed -> starting noise by Philox4x32-10 and Box-Muller: the same bits in every batch, process and machine.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The key is the seed; the counter is
(block, 0, image index, 0), so images of one seed never share a block. Beyond integers only IEEE 754's exactly rounded
+ - * / and square root are used, one numpy operation at a time: log, sin and cos are summed here from their series,
since a library's differ in the last bits from build to build and with the processor's vector unit.
"""

import math

import numpy as np
from numpy.typing import NDArray

RNG_VERSION = "philox4x32-10.box-muller.1"

ROUNDS = 10
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
LOG_2 = 0.6931471805599453
SQRT_HALF = 0.7071067811865476

Reals = NDArray[np.float64]
Words = NDArray[np.uint32]


def initial_latents(seed: int, image_index: int, shape: tuple[int, ...], sigma: float) -> NDArray[np.float32]:
    """Latents `shape` ([C, h, w] or [F, C, h, w]) float32 of standard deviation `sigma`, which the student starts from."""
    return normals(seed, image_index, math.prod(shape)).reshape(shape) * np.float32(sigma)


def normals(seed: int, image_index: int, count: int) -> NDArray[np.float32]:
    """`count` standard normals [count] float32; a longer draw begins with the shorter one.

    seed: 0..2^64-1, image_index: 0..2^32-1. float64 until the end: one rounding, and tails that reach 6.66.
    """
    blocks = -(-count // 4)
    counter = np.zeros((blocks, 4), np.uint32)
    counter[:, 0], counter[:, 2] = np.arange(blocks, dtype=np.uint32), image_index
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1, 2)
    return box_muller(words[:, 0], words[:, 1]).reshape(-1)[:count].astype(np.float32)


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds on `counter` [N, 4] uint32 under `key` (two 32-bit words) -> [N, 4] uint32."""
    x0, x1, x2, x3 = counter.astype(np.uint64).T
    for round_index in range(ROUNDS):
        k0, k1 = (np.uint64((word + round_index * step) & 0xFFFFFFFF) for word, step in zip(key, WEYL, strict=True))
        product0, product1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (product1 >> HALF) ^ x1 ^ k0, product1 & LOW, (product0 >> HALF) ^ x3 ^ k1, product0 & LOW
    words: Words = np.stack([x0, x1, x2, x3], axis=1).astype(np.uint32)
    return words


def box_muller(radius_word: Words, angle_word: Words) -> Reals:
    """[N, 2] independent standard normals from two arrays [N] of 32-bit words."""
    uniform = (radius_word.astype(np.float64) + 1.0) * 2.0**-32  # (0, 1]: the logarithm is finite
    radius = np.sqrt(-2.0 * log(uniform))
    sine, cosine = sine_cosine(angle_word)
    return np.stack([radius * cosine, radius * sine], axis=1)


def log(x: Reals) -> Reals:
    """Natural logarithm of positive x: log(m * 2^e) = 2 atanh((m - 1) / (m + 1)) + e log 2, m in [0.707, 1.414]."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < SQRT_HALF
    mantissa, exponent = np.where(small, mantissa * 2.0, mantissa), np.where(small, exponent - 1, exponent)
    s: Reals = (mantissa - 1.0) / (mantissa + 1.0)
    total: Reals = 2.0 * s * polynomial(s * s, [1 / (2 * k + 1) for k in range(12)]) + exponent * LOG_2
    return total


def sine_cosine(word: Words) -> tuple[Reals, Reals]:
    """Sine and cosine of 2 pi word / 2^32: the nearest quarter turn exactly, the rest (within pi/4) by Taylor's series."""
    turns = word.astype(np.int64)
    quarter = (turns + (1 << 29)) >> 30
    angle = (turns - (quarter << 30)).astype(np.float64) * (math.pi * 2.0**-31)
    square = angle * angle
    sine = angle * polynomial(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)])
    cosine = polynomial(square, [(-1) ** k / math.factorial(2 * k) for k in range(9)])
    return np.choose(quarter & 3, [sine, cosine, -sine, -cosine]), np.choose(quarter & 3, [cosine, -sine, -cosine, sine])


def polynomial(x: Reals, coefficients: list[float]) -> Reals:
    """Sum of coefficients[k] * x^k by Horner's rule, each operation rounded on its own."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total

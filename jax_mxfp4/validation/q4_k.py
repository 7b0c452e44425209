"""ggml's Q4_K: 256 weights share two float16 numbers, 32 of them a 6-bit scale and a 6-bit minimum.

The `gguf` package can decode this type but not encode it, so the search for scales is here.
Source: `quantize_row_q4_K_ref` and `make_qkx2_quants` in ggml/src/ggml-quants.c of ggml-org/ggml
(MIT). Sums are taken in another order than in C, so that a block may, rarely, be decided otherwise.
"""

import numpy as np

SUPERBLOCK = 256
"""Weights with common float16 factors; rows are whole superblocks."""

_BLOCK = 32
_LEVELS = 15  # codes 0..15
_SCALE_LEVELS = 63  # 6-bit scales and minima
_STEPS = 20  # of the search, from _LEVELS - 1 to _LEVELS + 1 quantization steps in the range
_CHUNK = 2**14  # superblocks at a time


def round_q4_k(x: np.ndarray) -> np.ndarray:
    """Round `x` to what Q4_K can hold.

    Args:
      x: float32 [..., K], K a multiple of 256.

    Returns:
      float32 [..., K].
    """
    rows = x.reshape(-1, SUPERBLOCK // _BLOCK, _BLOCK)
    chunks = [_round(rows[first : first + _CHUNK]) for first in range(0, len(rows), _CHUNK)]
    return np.concatenate(chunks).reshape(x.shape)


def _round(x: np.ndarray) -> np.ndarray:
    """Round superblocks, float32 [S, 8, 32]."""
    scales, minima = _fit(x)
    step, scales = _quantize_factors(scales)
    offset, minima = _quantize_factors(minima)
    d, m = step * scales, offset * minima
    return d * np.clip(np.rint(_divide(x + m, d)), 0, _LEVELS) - m


def _quantize_factors(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write factors [S, 8] of a superblock as a float16 unit times integers 0..63.

    Returns:
      The unit, float32 [S, 1, 1], and the integers, float32 [S, 8, 1].
    """
    top = np.max(factors, axis=1, keepdims=True)
    # Where all are zero, so is their product with any number.
    integers = np.clip(np.rint(_divide(np.float32(_SCALE_LEVELS), top) * factors), 0, _SCALE_LEVELS)
    unit = (top / np.float32(_SCALE_LEVELS)).astype(np.float16).astype(np.float32)
    return unit[..., None], integers[..., None]


def _fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Search the scale and the minimum of each block for the smallest weighted square error.

    Args:
      x: float32 [S, 8, 32].

    Returns:
      scales and minima, float32 [S, 8], both at least 0: x is about scale * code - minimum.
    """
    weight = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True)) + np.abs(x)
    top = np.max(x, axis=-1, keepdims=True)
    minimum = np.minimum(np.min(x, axis=-1, keepdims=True), np.float32(0))
    flat = top == minimum
    sum_w = np.sum(weight, axis=-1, keepdims=True)
    sum_x = np.sum(weight * x, axis=-1, keepdims=True)

    scale = _divide(top - minimum, np.float32(_LEVELS))
    codes = _codes(x, minimum, top, _LEVELS)
    error = _error(x, weight, codes, scale, minimum)
    for i in range(_STEPS + 1):
        # From the best minimum so far, as ggml does, not from that of the data.
        codes = _codes(x, minimum, top, _LEVELS - 1 + 0.1 * i)
        sum_l = np.sum(weight * codes, axis=-1, keepdims=True)
        sum_l2 = np.sum(weight * codes * codes, axis=-1, keepdims=True)
        sum_xl = np.sum(weight * codes * x, axis=-1, keepdims=True)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = _divide(sum_w * sum_xl - sum_x * sum_l, determinant)
        new_minimum = _divide(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        # The minimum is stored without sign: where it would be positive, fit the scale alone.
        positive = new_minimum > 0
        new_scale = np.where(positive, _divide(sum_xl, sum_l2), new_scale)
        new_minimum = np.where(positive, np.float32(0), new_minimum)
        new_error = _error(x, weight, codes, new_scale, new_minimum)
        better = (determinant > 0) & (new_error < error)
        scale = np.where(better, new_scale, scale)
        minimum = np.where(better, new_minimum, minimum)
        error = np.where(better, new_error, error)
    scale = np.where(flat, np.float32(0), scale)
    return scale[..., 0], -minimum[..., 0]


def _divide(x: np.ndarray | np.float32, y: np.ndarray | np.float32) -> np.ndarray:
    """x / y, and x where y is 0: such results are not used."""
    return np.asarray(x / np.where(y == 0, np.float32(1), y))


def _codes(x: np.ndarray, minimum: np.ndarray, top: np.ndarray, levels: float) -> np.ndarray:
    """Round to codes 0..15 so that `levels` steps lead from the minimum to the top."""
    inverse = _divide(np.float32(levels), top - minimum)
    return np.clip(np.rint(inverse * (x - minimum)), 0, _LEVELS)


def _error(
    x: np.ndarray, weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray
) -> np.ndarray:
    return np.sum(weight * np.square(scale * codes + minimum - x), axis=-1, keepdims=True)

"""Float64 checks of what is about to be timed."""

from typing import Any

import jax
import numpy as np

import jax_mxfp4 as mx
from jax_mxfp4.format import E2M1_VALUES, E8M0_BIAS

POINTS = 64  # rows and columns of a product that are compared


class WrongResult(Exception):
    """An operation that was to be timed does not compute what it should."""


def decode(w: mx.MXFP4Array) -> np.ndarray:
    """The exact float64 values of a packed array [..., K] of either layout."""
    w = mx.canonical(jax.tree.map(np.asarray, w))
    codes, scales = w.blocks, w.scales
    table = np.asarray(E2M1_VALUES, np.float64)
    pairs = np.stack([table[codes & 15], table[codes >> 4]], axis=-1)
    elements = pairs.reshape(*codes.shape[:-1], 32)
    exponents = scales.astype(np.int64) - E8M0_BIAS
    return (elements * np.exp2(exponents)[..., None]).reshape(*codes.shape[:-2], -1)


def spread(size: int, points: int = POINTS) -> np.ndarray:
    """At most `points` indices from 0 to size - 1, both included, in ascending order."""
    if size <= points:
        return np.arange(size)
    steps = np.linspace(0, size - 1, points).round().astype(np.int64)
    # Leave the regular grid, which could miss the same part of every tile.
    steps[1:-1] += np.random.default_rng(size).integers(0, size // points, points - 2)
    return np.minimum(steps, size - 1)


def check_product(what: str, actual: Any, x: Any, w: np.ndarray) -> None:
    """Compare bfloat16 `actual` [m, n] with the float64 product of x [m, K] and w [n, K].

    An element may be off by half a unit of bfloat16 and by the worst case of K float32 additions
    that truncate; all together by no more than 2^-8 of their norm.

    Raises:
      WrongResult: they differ by more, or `actual` is not finite.
    """
    actual, x = (np.asarray(a).astype(np.float64) for a in (actual, x))
    exact = x @ w.T
    if actual.shape != exact.shape:
        raise WrongResult(f"{what}: the result has shape {actual.shape}, expected {exact.shape}")
    sums = (1.25 * x.shape[-1] + 2) * 2.0**-23 * (np.abs(x) @ np.abs(w).T)
    error = np.abs(actual - exact)
    if not np.all(error <= sums + 2.0**-8 * (np.abs(exact) + sums)):  # also true for NaN
        at = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
        raise WrongResult(f"{what}: an element is {actual[at]}, expected {exact[at]}")
    norm, off = np.linalg.norm(exact), np.linalg.norm(error)
    if not off <= 2.0**-8 * norm:
        raise WrongResult(f"{what}: the error is {off / norm:.1e} of the norm of the result")


def rows_of(array: Any, rows: np.ndarray) -> Any:
    """Some rows of an array on a device, packed or not, without copying the others to the host."""
    return jax.tree.map(lambda a: np.asarray(a[rows] if len(rows) < len(a) else a), array)

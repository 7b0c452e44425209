"""Quantization noise on random data, with no model.

Protocol: rows of 4096 values from one distribution, row r of R scaled by 2 ** (r / R). A format
with power-of-two scales is better or worse depending on where in an octave the data lies, so an
average over an octave is the only figure that describes it. The figure is 10 log10 of the mean
over rows of signal over noise energy, both relative to the row's own signal.
"""

from collections.abc import Callable

import numpy as np

from jax_mxfp4.validation.formats import Format


def _with_outliers(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    x = rng.standard_normal(shape)
    return np.where(rng.random(shape) < 0.002, 10 * x, x)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "t5": lambda rng, shape: rng.standard_t(5, shape),
    "t3": lambda rng, shape: rng.standard_t(3, shape),
    "gaussian, 0.2 % x 10": _with_outliers,
}
"""Name -> draws float64 [R, C]; tN is Student's t with N degrees of freedom."""


def octave(distribution: str, rows: int = 512, columns: int = 4096, seed: int = 0) -> np.ndarray:
    """Draw rows whose scale rises by a factor of two from the first to behind the last.

    Args:
      distribution: a name in `DISTRIBUTIONS`.
      rows: R.
      columns: C.
      seed: of `numpy.random.default_rng`.

    Returns:
      float32 [R, C].
    """
    x = DISTRIBUTIONS[distribution](np.random.default_rng(seed), (rows, columns))
    return (x * np.exp2(np.arange(rows) / rows)[:, None]).astype(np.float32)


def mean_sqnr_db(format: Format, x: np.ndarray) -> float:
    """Return the SQNR in dB of `format` on the rows of x [R, C], each row counting the same."""
    noise = np.square(x.astype(np.float64) - format.round(x)).sum(axis=-1)
    return float(-10 * np.log10(np.mean(noise / np.square(x.astype(np.float64)).sum(axis=-1))))

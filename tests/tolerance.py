"""How far a result may be from the exact one: the only place that decides.

Decoding (`dequantize`, `take`) is exact: tests compare bits. So are products of integers small
enough for float32, in any order of summation. What is left is float32 accumulation of general
data, which is judged twice, against the product of float64 numbers.

1.  No element may exceed the worst case. A sum of K terms p_k in float32 makes at most K + 1
    roundings (the bias is one more term). The tensor cores of Volta to Hopper align the terms of
    an instruction to the largest one and truncate them (Fasi et al., "Numerical behavior of
    NVIDIA tensor cores", PeerJ Comput. Sci. 2021), so a rounding costs up to 2^-23 of the largest
    magnitude, not 2^-24. They add groups of at least 4 terms to the running sum, which is one
    more term per group: K + K / 4 + 1 errors, none above 2^-23 S with S = sum_k |p_k|. Products
    of a float32 and an E2M1 number are not exact in float32: one more error of 2^-24 |p_k| each,
    which sums to less than S 2^-23. In total gamma(K) S with gamma(K) = (1.25 K + 2) 2^-23.

2.  The worst case is far from what happens, and a kernel that loses a few bits would hide below
    it. So the root mean square over all elements is bounded too. Were the K errors independent
    and each at most 2^-23 of the norm P = sqrt(sum_k p_k^2), which is the scale of the partial
    sums of centered data, they would add up to sqrt(K) 2^-23 P. Truncation is not centered: each
    instruction of at least 16 terms shrinks the running sum by up to 2^-23 of it, K / 16 2^-23 P
    in total. rho(K) = (sqrt(K) + K / 16) 2^-23.
    For K = 2880 that is 2.8e-5 P, while TF32 products alone are off by about 2e-4 P.

Rounding to the output type adds half a unit in the last place of the exact result. Products below
the smallest normal float32 may be lost, which adds K 2^-126.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

UNIT_ROUNDOFF = {
    np.dtype(np.float32): 2.0**-24,
    np.dtype(ml_dtypes.bfloat16): 2.0**-8,
    np.dtype(np.float16): 2.0**-11,
}
_SMALLEST_SUBNORMAL = {
    np.dtype(np.float32): 2.0**-149,
    np.dtype(ml_dtypes.bfloat16): 2.0**-133,
    np.dtype(np.float16): 2.0**-24,
}
_TINY = 2.0**-126


def gamma(k: int) -> float:
    """Worst error of a float32 sum of k products, relative to the sum of magnitudes."""
    return (1.25 * k + 2) * 2.0**-23


def rho(k: int) -> float:
    """Root mean square error of a float32 sum of k products, relative to their norm."""
    return (np.sqrt(k) + k / 16) * 2.0**-23


@dataclass(frozen=True)
class Expected:
    """An exact result and how far float32 arithmetic may stray from it, before output rounding.

    Attributes:
      exact: float64 [...].
      worst: bound of each element's error, float64 [...].
      variance: mean square error, float64, broadcastable to [...].
    """

    exact: np.ndarray
    worst: np.ndarray
    variance: np.ndarray

    def __getitem__(self, index: slice) -> "Expected":
        return Expected(self.exact[index], self.worst[index], self.variance[index])


def expected_matmul(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> Expected:
    """The product of x [M, K] and w [N, K] plus bias [N], all exact values in float64."""
    k = x.shape[-1]
    exact = x @ w.T
    magnitude = np.abs(x) @ np.abs(w).T
    square = np.square(x) @ np.square(w).T
    if bias is not None:
        exact = exact + bias
        magnitude = magnitude + np.abs(bias)
        square = square + np.square(bias)
    return Expected(exact, gamma(k) * magnitude + k * _TINY, rho(k) ** 2 * square)


def assert_close(actual: np.ndarray, expected: Expected, what: str = "") -> None:
    """Assert that `actual` is the exact result but for float32 arithmetic and output rounding."""
    actual = np.asarray(actual)
    unit = UNIT_ROUNDOFF[actual.dtype]
    # Rounding is relative to what is rounded, which is the exact result plus its error.
    rounding = unit * (np.abs(expected.exact) + expected.worst)
    rounding += _SMALLEST_SUBNORMAL[actual.dtype] / 2
    error = np.abs(actual.astype(np.float64) - expected.exact)
    excess = error - (expected.worst + rounding)
    if not np.all(excess <= 0):  # also true for NaN
        at = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        raise AssertionError(
            f"{what}: element {tuple(map(int, at))} of {actual.shape} is {actual[at]}, expected "
            f"{expected.exact[at]} +- {expected.worst[at] + rounding[at]}"
        )
    rms = np.sqrt(np.mean(np.square(error)))
    bound = np.sqrt(np.mean(expected.variance + np.square(rounding)))
    assert rms <= bound, f"{what}: root mean square error {rms}, at most {bound} is allowed"


def activation_error(z: np.ndarray) -> np.ndarray:
    """Relative error of v * sigmoid(z) * (u + 1) in float32, z the argument of the sigmoid.

    exp(z) inherits |z| 2^-24 from the rounding of z, and CUDA's fast exponential is off by up to
    2 + 1.173 |z| units of 2^-23 (CUDA C++ Programming Guide, intrinsic functions). Division and
    three multiplications add less than 6 such units.
    """
    return (8 + 1.7 * np.abs(z)) * 2.0**-23

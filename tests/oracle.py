"""The operations in NumPy float64, written from the specification, and random operands.

Nothing here uses the code under test but `MXFP4Array`, the container.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import tolerance

import jax_mxfp4 as mx

GOLDEN = Path(__file__).parent / "golden"

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decode(w: mx.MXFP4Array) -> np.ndarray:
    """Exact float64 values of w [..., K]; NaN where the scale byte is 255."""
    blocks, scales = np.asarray(w.blocks), np.asarray(w.scales)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = np.ldexp(E2M1[codes], scales.astype(np.int32)[..., None] - 127)
    values = np.where(scales[..., None] == 255, np.nan, values)
    return values.reshape(w.shape)


def prepared_blocks(blocks: np.ndarray) -> np.ndarray:
    """Canonical blocks uint8 [..., 16] in the prepared layout, bit by bit from its table."""
    places = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 10, 11))  # of s, e1, e0, m
    result = np.zeros_like(blocks)
    for index in np.ndindex(blocks.shape[:-1]):
        for e in range(32):
            code = int(blocks[index][e // 2]) >> 4 * (e % 2) & 15
            s, e1, e0, m = code >> 3, code >> 2 & 1, code >> 1 & 1, code & 1
            p, c, h = e // 8, e % 8 // 2, e % 2
            bits = (s, e1 ^ m if p == 3 else e1, e0, m)
            for place, bit in zip(places[p], bits, strict=True):
                at = 16 * h + place  # in word c, whose least byte comes first
                result[index][4 * c + at // 8] |= bit << at % 8
    return result


def random_weight(
    rng: np.random.Generator, *shape: int, scales: tuple[int, int] = (122, 130)
) -> mx.MXFP4Array:
    """Uniformly random codes, and scale bytes in the closed range `scales`."""
    *leading, k = shape
    return mx.MXFP4Array(
        rng.integers(0, 256, (*leading, k // 32, 16), np.uint8),
        rng.integers(*scales, (*leading, k // 32), np.uint8, endpoint=True),
    )


def random_floats(rng: np.random.Generator, *shape: int, dtype: np.dtype) -> np.ndarray:
    """Normal numbers that use every mantissa bit of `dtype`."""
    return rng.standard_normal(shape).astype(dtype)


def random_integers(rng: np.random.Generator, *shape: int, dtype: np.dtype) -> np.ndarray:
    """Integers in -4..4.

    With scale bytes 125..128, products with weights are multiples of 1/8 of magnitude up to 48:
    float32 holds every partial sum of 2^16 of them exactly, so that no order of summation, no
    truncation and no split of operands changes the result.
    """
    return rng.integers(-4, 4, shape, endpoint=True).astype(dtype)


def moe(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate_up: mx.MXFP4Array,
    gate_up_bias: np.ndarray | None,
    down: mx.MXFP4Array,
    down_bias: np.ndarray | None,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> tolerance.Expected:
    """The expert layer on x [T, D], with the error that float32 arithmetic may cause.

    The hidden activation is rounded to x.dtype, as the operation is defined. Its error comes from
    the first product, from the activation function (which `tolerance.activation_error` bounds) and
    from rounding to a neighbour of the value that exact arithmetic would have been rounded to.
    """
    experts, width, _ = down.shape
    unit = tolerance.UNIT_ROUNDOFF[x.dtype]
    hidden_dtype, x = x.dtype, x.astype(np.float64)
    total = tolerance.Expected(*(np.zeros((x.shape[0], width)) for _ in range(3)))

    for expert in np.intersect1d(ids, np.arange(experts)):
        token, slot = np.nonzero(ids == expert)
        share = weights[token, slot].astype(np.float64)[:, None]
        bias = None if gate_up_bias is None else gate_up_bias[expert].astype(np.float64)
        gu = tolerance.expected_matmul(x[token], decode(gate_up[expert]), bias)

        gate = np.minimum(gu.exact[:, 0::2], limit)
        up = np.clip(gu.exact[:, 1::2], -limit, limit)
        sigmoid = 1 / (1 + np.exp(-alpha * gate))
        swish = gate * sigmoid
        exact_hidden = swish * (up + 1)
        # Slopes of the activation in gate and up; 1.1 bounds the slope of x * sigmoid(x).
        slope_gate, slope_up = 1.1 * np.abs(up + 1), np.abs(swish)
        worst_gate, worst_up = gu.worst[:, 0::2], gu.worst[:, 1::2]
        function = tolerance.activation_error(alpha * gate) * np.abs(exact_hidden)
        worst = slope_gate * worst_gate + slope_up * worst_up + 1.1 * worst_gate * worst_up
        worst += function
        variance = slope_gate**2 * gu.variance[:, 0::2] + slope_up**2 * gu.variance[:, 1::2]
        variance += function**2

        hidden = exact_hidden.astype(hidden_dtype).astype(np.float64)
        worst += 2 * unit * np.abs(exact_hidden)
        # Values this close to a rounding boundary may land on either side of it.
        reach = 4 * np.sqrt(variance)
        high, low = ((exact_hidden + d).astype(hidden_dtype) for d in (reach, -reach))
        jump = high.astype(np.float64) - low.astype(np.float64) - 2 * reach
        variance += np.square(np.maximum(jump, 0))

        w = decode(down[expert])
        bias = None if down_bias is None else down_bias[expert].astype(np.float64)
        y = tolerance.expected_matmul(hidden, w, bias)
        # One token may name an expert twice: np.add.at, not fancy assignment.
        np.add.at(total.exact, token, share * y.exact)
        np.add.at(total.worst, token, np.abs(share) * (y.worst + worst @ np.abs(w).T))
        np.add.at(total.variance, token, share**2 * (y.variance + variance @ np.square(w).T))

    # The sum over the token's experts is in float32 too.
    magnitude = np.abs(total.exact) + total.worst
    top_k = ids.shape[1]
    return tolerance.Expected(
        total.exact,
        total.worst + tolerance.gamma(top_k) * magnitude,
        total.variance + tolerance.rho(top_k) ** 2 * magnitude**2,
    )

"""Quantization to MXFP4: four scale rules, one element rounding, all exact in integers.

A block's scale byte is chosen from amax, the largest magnitude in the block; elements are then
divided by the scale, rounded to the nearest E2M1 value with ties to even, and saturated at 6
(OCP MX v1.0, sections 5.3.3 and 6.3). Section 6.3 gives the rule `floor` as the minimum and
permits others. With byte s for scale 2 ** (s - 127) and amax in [2 ** n, 2 ** (n + 1)):

========  ==========================================  ===========================================
rule      scale                                       source
========  ==========================================  ===========================================
`floor`   2 ** (n - 2); saturates 6 < amax / X < 8    OCP MX v1.0 section 6.3; arXiv 2310.10537
`even`    as floor, doubled if amax >= 7 * 2**(n-2)   torchao ScaleCalculationMode.EVEN,
                                                      compressed-tensors, Quark; arXiv 2603.08713
`rceil`   smallest with amax <= 6 * scale             NVIDIA cuda_fp8.h float -> e8m0 rounding up,
                                                      as in cuBLAS; torchao ScaleCalculationMode.
                                                      RCEIL; triton_kernels ROUND_UP
`mse`     the floor scale or its double, whichever    search over {e, e + 1} as in AutoRound
          has the smaller squared error; ties floor
========  ==========================================  ===========================================

What the specification leaves open is decided here once, for every rule:

* An all-zero block has byte 0. The sign of zero is kept, also when an element underflows.
* The byte is clamped to 0..252. Below, elements round against 2 ** -127. Above, a scale of
  2 ** 126 would decode finite input to Inf (4 * 2 ** 126 is beyond float32); NVIDIA and torchao
  allow that, here such blocks saturate at 6 * 2 ** 125.
* A block with a NaN has byte 255 and codes 0 (OCP MX v1.0, section 5.1: all its elements are NaN).
* A block with an Inf but no NaN has byte 254; Inf becomes code 7 with its sign, and the finite
  elements round against 2 ** 127, as with NVIDIA's conversions. It decodes to Inf.

Exponents are read from the bits: log2 is wrong next to powers of two, and arithmetic on
subnormals is flushed to zero by XLA's CPU backend.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mxfp4 import format as mxfp4_format
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.format import BLOCK_SIZE, E2M1_EMAX, E8M0_MAX, E8M0_MAX_FINITE, E8M0_NAN

ScaleRule = Literal["floor", "even", "rceil", "mse"]
"""Names of the scale rules."""

SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)
"""The scale rules that `quantize` accepts."""

_F32_INF = np.uint32(0x7F800000)
_F32_MAX = np.uint32(0x7F7FFFFF)
_MANTISSA_BITS = np.uint32(23)
_MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)

# Midpoints between neighbouring E2M1 magnitudes, as (exponent, float32 mantissa field), and
# whether the midpoint itself rounds up, which it does towards the even code.
_MIDPOINTS = (
    (-2, 0x000000, False),  # 0.25 between codes 0 and 1
    (-1, 0x400000, True),  # 0.75 between codes 1 and 2
    (0, 0x200000, False),  # 1.25
    (0, 0x600000, True),  # 1.75
    (1, 0x200000, False),  # 2.5
    (1, 0x600000, True),  # 3.5
    (2, 0x200000, False),  # 5
)

# Added to the bits of amax, these carry into the exponent where a rule's scale doubles.
_EXPONENT_CARRY = {
    "floor": np.uint32(0),
    "even": np.uint32(0x200000),  # from 1.75 * 2 ** n
    "rceil": np.uint32(0x3FFFFF),  # above 1.5 * 2 ** n
}


def quantize(x: jax.Array, scale_rule: ScaleRule = "even") -> MXFP4Array:
    """Pack `x` into MXFP4 blocks of 32 along its last axis.

    The result depends on the values of `x` alone, not on its dtype, and is the same on every
    backend. Rules, special values and sources are described at the top of this module; `even` is
    the default because it needs amax only and comes within 0.05 dB of the best scale on Gaussian
    data.

    Args:
      x: float32, bfloat16 or float16 [..., K], K a positive multiple of 32.
      scale_rule: "floor", "even", "rceil" or "mse".

    Returns:
      `MXFP4Array` of logical shape [..., K].

    Raises:
      TypeError: `x` has another dtype.
      ValueError: `x` has no axis, K is not a positive multiple of 32, or the rule is unknown.
    """
    _check(x, scale_rule)
    return _quantize(jnp.asarray(x), scale_rule)


def fake_quantize(x: jax.Array, scale_rule: ScaleRule = "even") -> jax.Array:
    """Round `x` to what MXFP4 can hold, with a straight-through gradient.

    The value is ``dequantize(quantize(x, scale_rule), x.dtype)`` bit by bit; the derivative is the
    identity everywhere, also where elements saturate (Bengio et al., arXiv 1308.3432). For float16
    the decoded value 65536, to which magnitudes from 57344 on can round, is beyond the dtype and
    becomes Inf.

    Args:
      x: float32, bfloat16 or float16 [..., K], K a positive multiple of 32.
      scale_rule: "floor", "even", "rceil" or "mse".

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: `x` has another dtype.
      ValueError: `x` has no axis, K is not a positive multiple of 32, or the rule is unknown.
    """
    _check(x, scale_rule)
    return _fake_quantize(jnp.asarray(x), scale_rule)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _fake_quantize(x: jax.Array, scale_rule: str) -> jax.Array:
    w = _quantize(x, scale_rule)
    return mxfp4_format.decode(w.blocks, w.scales, x.dtype)


@_fake_quantize.defjvp
def _fake_quantize_jvp(scale_rule, primals, tangents):
    return _fake_quantize(*primals, scale_rule), tangents[0]


def _check(x: jax.Array, scale_rule: str) -> None:
    dtype = getattr(x, "dtype", None)
    if dtype is None or jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
        found = type(x).__name__ if dtype is None else dtype
        raise TypeError(f"x must be a float32, bfloat16 or float16 array, got {found}")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"the last axis of x must be a positive multiple of {BLOCK_SIZE}, got shape {x.shape}"
        )
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"scale_rule must be one of {SCALE_RULES}, got {scale_rule!r}")


@partial(jax.jit, static_argnames="scale_rule")
def _quantize(x: jax.Array, scale_rule: str) -> MXFP4Array:
    bits = _float32_bits(x).reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    magnitude = bits & _MAGNITUDE_BITS
    # Magnitudes order like their bits, with Inf above all numbers and NaN above Inf.
    amax = jnp.max(magnitude, axis=-1)

    if scale_rule == "mse":
        scale = _mse_scale(magnitude, _amax_scale(amax, "floor"))
    else:
        scale = _amax_scale(amax, scale_rule)
    scale = jnp.where(amax == _F32_INF, np.uint32(E8M0_MAX), scale)
    is_nan = amax > _F32_INF

    sign = (bits >> np.uint32(31)) << np.uint32(3)
    codes = _magnitude_codes(magnitude, scale) | sign
    codes = jnp.where(is_nan[..., None], np.uint32(0), codes).astype(jnp.uint8)
    scale = jnp.where(is_nan, np.uint32(E8M0_NAN), scale).astype(jnp.uint8)
    return MXFP4Array(mxfp4_format.pack_codes(codes.reshape(x.shape)), scale)


def _float32_bits(x: jax.Array) -> jax.Array:
    """Return the bits of `x` widened to float32, exactly."""
    if x.dtype == jnp.bfloat16:
        # A shift, because a conversion could flush subnormals.
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << np.uint32(16)
    # The subnormals of float16 are normal numbers in float32.
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _amax_scale(amax: jax.Array, scale_rule: str) -> jax.Array:
    """Return the scale bytes (as uint32) that a rule gives to the bits of finite amax values."""
    exponent = (amax + _EXPONENT_CARRY[scale_rule]) >> _MANTISSA_BITS
    emax = np.uint32(E2M1_EMAX)
    return jnp.minimum(jnp.maximum(exponent, emax) - emax, np.uint32(E8M0_MAX_FINITE))


def _magnitude_codes(magnitude: jax.Array, scale: jax.Array) -> jax.Array:
    """Round magnitudes to E2M1 codes 0..7: to nearest, ties to even, saturating.

    Args:
      magnitude: float32 bits without sign, uint32 [..., 32].
      scale: scale bytes 0..254, uint32 [...].

    Returns:
      uint32 [..., 32].
    """
    codes = jnp.zeros_like(magnitude)
    for exponent, mantissa, rounds_up in _MIDPOINTS:
        midpoint = _scaled_bits(exponent, mantissa, scale)
        threshold = midpoint - np.uint32(rounds_up)
        # At byte 254 the upper midpoints are beyond float32, yet Inf is above them.
        threshold = jnp.minimum(threshold, _F32_MAX)
        codes = codes + (magnitude > threshold[..., None]).astype(jnp.uint32)
    return codes


def _scaled_bits(exponent: int, mantissa: int, scale: jax.Array) -> jax.Array:
    """Return the float32 bits of ``(1 + mantissa / 2**23) * 2 ** (exponent + scale - 127)``.

    Results below the normal range are exact subnormals for the midpoints used here; results above
    it continue the encoding past Inf, in order.
    """
    significand = np.uint32(0x800000 | mantissa)
    biased = scale.astype(jnp.int32) + np.int32(exponent)
    normal = (jnp.maximum(biased, 1).astype(jnp.uint32) - np.uint32(1)) << _MANTISSA_BITS
    underflow = jnp.maximum(np.int32(1) - biased, 0).astype(jnp.uint32)
    return normal + (significand >> underflow)


def _mse_scale(magnitude: jax.Array, scale: jax.Array) -> jax.Array:
    """Return `scale` or `scale + 1`, whichever has the smaller squared error in its block.

    With v = x / 2 ** (scale - 127), u the E2M1 rounding of v and t twice that of v / 2, the larger
    scale wins if ``sum (u - v)**2 - (t - v)**2 = sum (u - t) * (u + t - 2 * v)`` is positive. A
    term is 0 where v <= 1/4, and elsewhere v < 8 is a multiple of 2 ** -25: the sum is computed in
    integers without error, so that no two backends can decide a block differently.

    Args:
      magnitude: float32 bits without sign, uint32 [..., 32].
      scale: the floor scale, bytes 0..252, uint32 [...].

    Returns:
      Scale bytes 0..252, uint32 [...].
    """
    larger = jnp.minimum(scale + np.uint32(1), np.uint32(E8M0_MAX_FINITE))
    step = (larger - scale)[..., None]
    u = _doubled_value(_magnitude_codes(magnitude, scale)).astype(jnp.int32)
    t = (_doubled_value(_magnitude_codes(magnitude, larger)) << step).astype(jnp.int32)

    # v in units of 2 ** -25; bits are dropped only where v <= 1/4.
    exponent = (magnitude >> _MANTISSA_BITS).astype(jnp.int32)
    fraction = (magnitude & np.uint32(0x7FFFFF)).astype(jnp.int32)
    significand = jnp.where(exponent > 0, fraction | np.int32(0x800000), fraction)
    shift = jnp.maximum(exponent, 1) - scale.astype(jnp.int32)[..., None] + np.int32(2)
    v = jnp.where(
        shift >= 0,
        significand << jnp.clip(shift, 0, 4),
        significand >> jnp.clip(-shift, 0, 31),
    )

    # u and t are doubled, so four times the sum is S - 2 ** -23 * V with integer S and V. V has
    # up to 35 bits: it is summed in two halves, V = high * 2 ** 14 + low with 0 <= low < 2 ** 14.
    gap = u - t
    s = jnp.sum(gap * (u + t), axis=-1, dtype=jnp.int32)
    low = jnp.sum(gap * (v & np.int32(0x3FFF)), axis=-1, dtype=jnp.int32)
    high = jnp.sum(gap * (v >> np.int32(14)), axis=-1, dtype=jnp.int32) + (low >> np.int32(14))
    # S * 2 ** 23 > high * 2 ** 14 + low needs no low: both sides differ by multiples of 2 ** 14.
    return jnp.where((s << np.int32(9)) > high, larger, scale)


def _doubled_value(code: jax.Array) -> jax.Array:
    """Return twice the magnitude of codes 0..7: 0, 1, 2, 3, 4, 6, 8, 12."""
    doublings = jnp.maximum(code >> np.uint32(1), np.uint32(1)) - np.uint32(1)
    normal = (np.uint32(2) | (code & np.uint32(1))) << doublings
    return jnp.where(code < 2, code, normal)

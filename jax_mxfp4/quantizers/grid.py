"""The MXFP4 grid in float32: scales as powers of two, rounding to E2M1, packing what was rounded.

`jax_mxfp4.quantize` decides everything in integers, from the input alone. The quantizers of this
package move values between one element and the next, so they work in float32; their results are
packed without a second rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.format import BLOCK_SIZE, E2M1_EMAX, E2M1_MAX, E8M0_MAX_FINITE, pack_codes

_MANTISSA_BITS = np.uint32(23)

MIN_BYTE = 1
"""Smallest scale byte that is used here: 2 ** (byte - 127) is a normal float32 number."""


def floor_byte(amax: jax.Array) -> jax.Array:
    """Return the scale byte that the rule `floor` gives to float32 amax, as int32; at least 1."""
    exponent = lax.bitcast_convert_type(amax, jnp.uint32) >> _MANTISSA_BITS
    return clip_byte(exponent.astype(jnp.int32) - np.int32(E2M1_EMAX))


def clip_byte(byte: jax.Array) -> jax.Array:
    """Return int32 scale bytes clipped to those that this module can use."""
    return jnp.clip(byte, MIN_BYTE, E8M0_MAX_FINITE)


def scale_of(byte: jax.Array) -> jax.Array:
    """Return 2 ** (byte - 127) as float32, for int32 bytes 1 to 252; exact on every backend."""
    return lax.bitcast_convert_type(byte.astype(jnp.uint32) << _MANTISSA_BITS, jnp.float32)


def step_of(magnitude: jax.Array) -> jax.Array:
    """Return the distance between the E2M1 values around a magnitude: 1/2 to 2, 1 to 4, then 2."""
    half, one, two = (np.float32(step) for step in (0.5, 1, 2))
    return jnp.where(magnitude < 2, half, jnp.where(magnitude < 4, one, two))


def round_to_e2m1(x: jax.Array) -> jax.Array:
    """Round float32 values to the nearest E2M1 value, ties to even codes, saturating at 6."""
    magnitude = jnp.abs(x)
    step = step_of(magnitude)
    # An even multiple of the step is an even code.
    rounded = jnp.minimum(jnp.round(magnitude / step) * step, np.float32(E2M1_MAX))
    return jnp.where(x < 0, -rounded, rounded)


def pack(values: jax.Array, scales: jax.Array) -> MXFP4Array:
    """Pack E2M1 values and scale bytes, exactly.

    Args:
      values: float32 [..., K], each one of `jax_mxfp4.format.E2M1_VALUES`.
      scales: integer scale bytes [..., K / 32].
    """
    # Doubled magnitudes 0, 1, 2, 3, 4, 6, 8, 12 of codes 0 to 7.
    doubled = (2 * jnp.abs(values)).astype(jnp.uint8)
    code = jnp.where(
        doubled < 4, doubled, jnp.where(doubled < 8, 2 + doubled // 2, 4 + doubled // 4)
    )
    sign = (values < 0).astype(jnp.uint8) << np.uint8(3)
    return MXFP4Array(pack_codes(code.astype(jnp.uint8) | sign), scales.astype(jnp.uint8))


def blocked(x: jax.Array) -> jax.Array:
    """Return x [..., K] as [..., K / 32, 32]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)

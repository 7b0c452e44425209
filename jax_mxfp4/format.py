"""The MXFP4 format: its constants, its nibble order and its exact decoding.

An MXFP4 block is 32 elements in E2M1 (sign, two exponent bits, one mantissa bit) that share one
E8M0 scale byte: ``v[i] = e2m1(code[i]) * 2 ** (scale - 127)``. Source: OCP Microscaling Formats
(MX) Specification v1.0, sections 5.1 (blocks), 5.3.3 (FP4 E2M1) and 5.4.1 (E8M0).

The specification leaves the physical layout open. Here, as in the GPT-OSS checkpoints, byte ``j``
of a block holds element ``2j`` in its low nibble and element ``2j + 1`` in its high nibble, and
the scales are an array of their own.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

BLOCK_SIZE = 32
"""Elements that share one scale (OCP MX v1.0, section 5.2)."""

BLOCK_BYTES = BLOCK_SIZE // 2
"""Bytes of packed codes in one block."""

E2M1_MAX = 6.0
"""Largest finite E2M1 magnitude; E2M1 has neither Inf nor NaN."""

E2M1_VALUES = (
    *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
)
"""Value of each of the 16 element codes."""

E2M1_EMAX = 2
"""Exponent of the largest power of two in E2M1 (4 = 2 ** 2)."""

E8M0_BIAS = 127
"""Byte ``s`` stands for ``2 ** (s - 127)``; byte 0 is ``2 ** -127``, there is no zero."""

E8M0_MAX = 254
"""Largest byte that is a number, ``2 ** 127``."""

E8M0_NAN = 255
"""The only special scale byte: every element of its block is NaN, whatever its code."""

E8M0_MAX_FINITE = 252
"""Largest byte for which all 16 codes are finite in float32 and bfloat16."""

_BF16_INF = 0x7F80
_BF16_NAN = 0x7FC0


def unpack_codes(blocks: jax.Array) -> jax.Array:
    """Return the element codes 0..15 of packed blocks, in element order.

    Args:
      blocks: uint8 [..., G, 16], a JAX or NumPy array; the result is of the same kind.

    Returns:
      uint8 [..., 32 * G].
    """
    codes = (blocks[..., None] >> np.array([0, 4], np.uint8)) & np.uint8(0xF)
    return codes.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK_SIZE)


def pack_codes(codes: jax.Array) -> jax.Array:
    """Pack element codes 0..15 into blocks; the inverse of `unpack_codes`.

    Args:
      codes: uint8 [..., 32 * G], a JAX or NumPy array; the result is of the same kind.

    Returns:
      uint8 [..., G, 16].
    """
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // BLOCK_SIZE, BLOCK_BYTES, 2)
    return pairs[..., 0] | (pairs[..., 1] << np.uint8(4))


@partial(jax.jit, static_argnames="dtype", inline=True)
def decode(blocks: jax.Array, scales: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Decode packed blocks; every cell is the exact value rounded once (nearest even) to `dtype`.

    float32 and bfloat16 hold every finite value exactly, subnormals included; products beyond
    their range (12 cells of scale bytes 253 and 254) are Inf, as IEEE 754 rounds them. float16
    overflows to Inf and underflows gradually. Scale byte 255 gives NaN.

    Args:
      blocks: uint8 [..., G, 16].
      scales: uint8 [..., G].
      dtype: float32, bfloat16 or float16.

    Returns:
      `dtype` [..., 32 * G].

    Raises:
      TypeError: `dtype` is another type.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    bits = _bfloat16_bits(blocks, scales)
    bits = bits.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK_SIZE)
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(bits, jnp.bfloat16)
    # bfloat16 is the upper half of float32, so widening is a shift. A float conversion could
    # flush the subnormals of scale bytes 0 and 1.
    wide = lax.bitcast_convert_type(bits.astype(jnp.uint32) << np.uint32(16), jnp.float32)
    return wide.astype(dtype)


def _bfloat16_bits(blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """Return the bfloat16 images of all elements as uint16 [..., G, 16, 2].

    The bits are assembled with integers: a multiplication would lose subnormals on XLA's CPU
    backend, and exp2 is not exact there. A magnitude code ``m = 0bEEM`` shifted to the mantissa's
    top, ``m << 6``, is already the bfloat16 image of ``e2m1(m) * 2 ** -126``, the value at scale
    byte 1. Byte s adds ``(s - 1) << 7`` to the exponent, with three exceptions: zero stays zero,
    0.5 (E2M1's one subnormal) becomes normal and drops its mantissa bit, and at byte 0 the
    magnitudes below 2 are subnormal, one binary place lower.
    """
    scale = scales.astype(jnp.int16)[..., None, None]
    exponent = (scale - np.int16(1)) << np.int16(7)
    # At bytes 0 and 1 the image is at least (m << 6) >> (1 - s): gradual underflow.
    underflow = jnp.where(scale < 2, np.int16(1) - scale, np.int16(15))

    code = blocks.astype(jnp.int16)[..., None] >> np.array([0, 4], np.int16)
    magnitude = code & np.int16(7)
    shifted = magnitude << np.int16(6)
    normal = exponent + jnp.where(magnitude == 1, np.int16(0), shifted)
    image = jnp.maximum(normal, shifted >> underflow)
    # 4 and 6 at byte 254 have exponent 256, which wraps around to a negative int16.
    overflow = (scale >= 253) & ((normal >= _BF16_INF) | (normal < 0))
    image = jnp.where(overflow, np.int16(_BF16_INF), image)
    image = jnp.where(magnitude == 0, np.int16(0), image)
    image = jnp.where(scale == E8M0_NAN, np.int16(_BF16_NAN), image)
    sign = (code & np.int16(8)) << np.int16(12)
    return lax.bitcast_convert_type(image | sign, jnp.uint16)

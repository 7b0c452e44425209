"""The MXFP4 format: its constants, its nibble order and its exact decoding.

An MXFP4 block is 32 elements in E2M1 (sign, two exponent bits, one mantissa bit) that share one
E8M0 scale byte: ``v[i] = e2m1(code[i]) * 2 ** (scale - 127)``. Source: OCP Microscaling Formats
(MX) Specification v1.0, sections 5.1 (blocks), 5.3.3 (FP4 E2M1) and 5.4.1 (E8M0).

The specification leaves the physical layout open. Here, as in the GPT-OSS checkpoints, byte ``j``
of a block holds element ``2j`` in its low nibble and element ``2j + 1`` in its high nibble, and
the scales are an array of their own. This is the *canonical* layout, that of files and of
everything below that does not say otherwise.

In the *prepared* layout, which the CUDA kernels of `matmul` and `moe` read, the 16 bytes of each
block are arranged in another way; scales are the same. A block is four little-endian 32-bit words
c = 0..3 at bytes 4c, each of a low half h = 0 and a high half h = 1. Word c, half h holds the
elements 8p + 2c + h for p = 0..3. The bits of their codes, s, e1, e0 and m from high to low, are
these bits of the half:

====  ====  ===========  ====  ====
p     s     e1           e0    m
====  ====  ===========  ====  ====
0     15    8            7     6
1     12    5            4     3
2     9     2            1     0
3     14    13: e1 ^ m   10    11
====  ====  ===========  ====  ====

With that a word becomes four pairs of bfloat16 values (times powers of two) in few instructions,
``w & 0x81C081C0``, ``(w << 3) & 0x81C081C0``, ``(w << 6) & 0x81C081C0`` and
``(((w >> 5) & 0x03600360) * 69) & 0x81C081C0``, and word c is what lane c of a group of four wants
as its matrix operand, with the elements in their natural order along K.
"""

from functools import partial
from typing import Any, Literal

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

BlockLayout = Literal["canonical", "prepared"]
"""How the codes of a block lie in its 16 bytes; see the module's docstring."""

_BF16_INF = 0x7F80
_BF16_NAN = 0x7FC0


def unpack_codes(blocks: jax.Array) -> jax.Array:
    """Return the element codes 0..15 of canonical blocks, in element order.

    Args:
      blocks: uint8 [..., G, 16], a JAX or NumPy array; the result is of the same kind.

    Returns:
      uint8 [..., 32 * G].
    """
    codes = (blocks[..., None] >> np.array([0, 4], np.uint8)) & np.uint8(0xF)
    return codes.reshape(*blocks.shape[:-2], blocks.shape[-2] * BLOCK_SIZE)


def pack_codes(codes: jax.Array) -> jax.Array:
    """Pack element codes 0..15 into canonical blocks; the inverse of `unpack_codes`.

    Args:
      codes: uint8 [..., 32 * G], a JAX or NumPy array; the result is of the same kind.

    Returns:
      uint8 [..., G, 16].
    """
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // BLOCK_SIZE, BLOCK_BYTES, 2)
    return pairs[..., 0] | (pairs[..., 1] << np.uint8(4))


def prepare_blocks(blocks: Any) -> Any:
    """Rearrange blocks from the canonical to the prepared layout.

    Args:
      blocks: uint8 [..., 16], a JAX or NumPy array; the result is of the same kind.

    Returns:
      uint8 [..., 16].
    """
    # Shifts and masks of words only, here and in the inverse: XLA makes one elementwise loop of it.
    # Row p, column c: the elements 8p + 2c (low nibble) and 8p + 2c + 1 (high nibble).
    pairs = blocks.reshape(*blocks.shape[:-1], 4, 4)
    words: Any = np.uint32(0)
    for p in range(4):
        pair = pairs[..., p, :].astype(np.uint32)
        # One code in each half of a word.
        codes = (pair & np.uint32(0xF)) | ((pair & np.uint32(0xF0)) << np.uint32(12))
        if p < 3:
            placed = (codes & _halves(0b1000)) << np.uint32(12)
            placed = (placed | ((codes & _halves(0b0111)) << np.uint32(6))) >> np.uint32(3 * p)
        else:
            mantissas = codes & _halves(0b0001)
            placed = (codes & _halves(0b1100)) << np.uint32(11)
            placed = placed ^ (mantissas << np.uint32(13)) ^ (mantissas << np.uint32(11))
            placed = placed | ((codes & _halves(0b0010)) << np.uint32(9))
        words = words | placed
    parts = (words[..., None] >> np.array([0, 8, 16, 24], np.uint32)) & np.uint32(0xFF)
    return parts.astype(np.uint8).reshape(blocks.shape)


def canonical_blocks(blocks: Any) -> Any:
    """Rearrange blocks from the prepared to the canonical layout; the inverse of `prepare_blocks`.

    Args:
      blocks: uint8 [..., 16], a JAX or NumPy array; the result is of the same kind.

    Returns:
      uint8 [..., 16].
    """
    parts = blocks.reshape(*blocks.shape[:-1], 4, 4).astype(np.uint32)
    words: Any = np.uint32(0)
    for byte in range(4):
        words = words | (parts[..., byte] << np.uint32(8 * byte))
    words = words[..., None, :]  # the new axis is p
    # One code in each half of a word: of p = 0, 1, 2, then of p = 3.
    shifted = words << np.array([[0], [3], [6], [0]], np.uint32)
    first = (shifted >> np.uint32(12)) & _halves(0b1000)
    first = first | ((shifted >> np.uint32(6)) & _halves(0b0111))
    last = words >> np.uint32(11)
    last = (last & _halves(0b1101)) ^ ((last & _halves(0b0001)) << np.uint32(2))
    last = last | ((words >> np.uint32(9)) & _halves(0b0010))
    is_first = np.array([[0xFFFFFFFF]] * 3 + [[0]], np.uint32)
    codes = (first & is_first) | (last & ~is_first)
    pairs = (codes | (codes >> np.uint32(12))) & np.uint32(0xFF)
    return pairs.astype(np.uint8).reshape(blocks.shape)


def _halves(bits: int) -> np.uint32:
    """Return a 32-bit word with `bits` in both halves."""
    return np.uint32(bits << 16 | bits)


@partial(jax.jit, static_argnames="dtype", inline=True)
def decode(blocks: jax.Array, scales: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Decode canonical blocks to `dtype`.

    Every cell is the exact value rounded once, to nearest even.

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

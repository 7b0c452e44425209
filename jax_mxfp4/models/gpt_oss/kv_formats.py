"""What a key-value cache holds: rows of head_dim elements, as they are or in fewer bits."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_mxfp4 import ops
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.format import BLOCK_SIZE, E8M0_BIAS
from jax_mxfp4.ops import Implementation
from jax_mxfp4.quantize import quantize

CacheFormat = Literal["fp8", "mxfp4"] | None

_E4M3_MAX = 448.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class FP8Rows:
    """Rows of float8 (E4M3) elements with one power of two each.

    A row is ``codes * 2 ** (scales - 127)``; the scale is the least that keeps its largest element
    within E4M3's 448. E4M3 has 4 bits of precision; the common scale keeps outliers in range.

    Attributes:
      codes: float8_e4m3fn [..., K].
      scales: uint8 [...].
    """

    codes: jax.Array
    scales: jax.Array


# A layer's keys or values [..., head_dim].
Rows = jax.Array | FP8Rows | MXFP4Array


def check_format(name: str, cache_format: CacheFormat, head_dim: int) -> None:
    """Raise ValueError where `cache_format` is unknown or cannot hold rows of head_dim elements."""
    if cache_format is not None and cache_format not in get_args(get_args(CacheFormat)[0]):
        raise ValueError(f'{name}: expected "fp8", "mxfp4" or None, found {cache_format!r}')
    if cache_format == "mxfp4" and head_dim % BLOCK_SIZE:
        raise ValueError(
            f'{name}: "mxfp4" expects a head_dim that is a multiple of {BLOCK_SIZE}, '
            f"found {head_dim}"
        )


def empty_rows(shape: tuple[int, ...], dtype: DTypeLike, cache_format: CacheFormat) -> Rows:
    """Return rows [..., head_dim] of zeros."""
    if cache_format == "fp8":
        return FP8Rows(jnp.zeros(shape, jnp.float8_e4m3fn), jnp.zeros(shape[:-1], jnp.uint8))
    if cache_format == "mxfp4":
        packed = MXFP4Array.shape_dtype(shape)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), packed)
    return jnp.zeros(shape, dtype)


def encode_like(rows: Rows, x: jax.Array) -> Rows:
    """Return x [..., head_dim] in the format of `rows`."""
    if isinstance(rows, MXFP4Array):
        return quantize(x)
    if isinstance(rows, FP8Rows):
        return _encode_fp8(x)
    return x.astype(rows.dtype)


def decode_rows(rows: Rows, dtype: DTypeLike, implementation: Implementation = None) -> jax.Array:
    """Return the values of `rows` in `dtype`, [..., head_dim]."""
    if isinstance(rows, MXFP4Array):
        return ops.dequantize(rows, jnp.dtype(dtype), implementation=implementation)
    if isinstance(rows, FP8Rows):
        scale = _power_of_two(rows.scales.astype(jnp.int32) - np.int32(E8M0_BIAS))
        return (rows.codes.astype(jnp.float32) * scale[..., None]).astype(dtype)
    return rows.astype(dtype)


def _encode_fp8(x: jax.Array) -> FP8Rows:
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    # frexp(a) = (m, e) with 0.5 <= m < 1: the least power of two that is not below a is 2^e, or
    # 2^(e - 1) where m is 0.5.
    mantissa, exponent = jnp.frexp(largest / np.float32(_E4M3_MAX))
    exponent = jnp.where(mantissa == np.float32(0.5), exponent - 1, exponent)
    # Normal numbers only, whose reciprocals are exact; NaN and infinite rows stay what they are.
    exponent = jnp.clip(exponent, -126, 126)
    codes = wide * _power_of_two(-exponent)[..., None]
    biased = (exponent + np.int32(E8M0_BIAS)).astype(jnp.uint8)
    return FP8Rows(codes.astype(jnp.float8_e4m3fn), biased)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Return 2 ** exponent for int32 exponents -126 to 127, from the bits of a float32."""
    bits = (exponent + np.int32(127)) << np.int32(23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

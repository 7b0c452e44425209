"""Quantizers that need no calibration beyond `jax_mxfp4.quantize`: stochastic, error diffusion.

Both lose about 3 dB to rounding to nearest on single weights. Stochastic rounding is for sums of
many rounded values, as in training, where an unbiased error averages out; error diffusion keeps
the sum of each block close to that of the original.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.format import BLOCK_SIZE, E2M1_MAX, E8M0_MAX_FINITE
from jax_mxfp4.quantize import ScaleRule, quantize
from jax_mxfp4.quantizers.grid import (
    MIN_BYTE,
    blocked,
    clip_byte,
    pack,
    round_to_e2m1,
    scale_of,
    step_of,
)


def stochastic_quantize(
    x: jax.Array, key: jax.Array, scale_rule: ScaleRule = "rceil"
) -> MXFP4Array:
    """Round each element up or down at random, with the probability that makes the mean exact.

    Under the rule `rceil` nothing saturates, and the expected value of the result is `x`. The
    other rules saturate the largest elements, which biases those.

    Args:
      x: float32, bfloat16 or float16 [..., K], K a positive multiple of 32. Blocks that are not
        finite, all zero or near the ends of float32's range give what `quantize` gives.
      key: from `jax.random.key`.
      scale_rule: "floor", "even", "rceil" or "mse".

    Returns:
      `MXFP4Array` of logical shape [..., K].

    Raises:
      TypeError, ValueError: as `jax_mxfp4.quantize`.
    """
    return _stochastic(jnp.asarray(x), quantize(x, scale_rule), key)


@jax.jit
def _stochastic(x: jax.Array, nearest: MXFP4Array, key: jax.Array) -> MXFP4Array:
    scaled = blocked(x.astype(jnp.float32)) / _scales(nearest)
    magnitude = jnp.minimum(jnp.abs(scaled), np.float32(E2M1_MAX))
    step = step_of(magnitude)
    lower = jnp.floor(magnitude / step) * step
    goes_up = jax.random.uniform(key, scaled.shape) < (magnitude - lower) / step
    values = jnp.where(goes_up, lower + step, lower)
    return _where_usable(jnp.where(scaled < 0, -values, values), nearest)


def diffuse_quantize(x: jax.Array, scale_rule: ScaleRule = "even") -> MXFP4Array:
    """Round to nearest, adding the error of each element to the next one of its block.

    Args:
      x: float32, bfloat16 or float16 [..., K], K a positive multiple of 32. Blocks that are not
        finite, all zero or near the ends of float32's range give what `quantize` gives.
      scale_rule: "floor", "even", "rceil" or "mse"; scales are those of `x` itself.

    Returns:
      `MXFP4Array` of logical shape [..., K].

    Raises:
      TypeError, ValueError: as `jax_mxfp4.quantize`.
    """
    return _diffuse(jnp.asarray(x), quantize(x, scale_rule))


@jax.jit
def _diffuse(x: jax.Array, nearest: MXFP4Array) -> MXFP4Array:
    scaled = blocked(x.astype(jnp.float32)) / _scales(nearest)

    def step(error: jax.Array, element: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = round_to_e2m1(element + error)
        return element + error - value, value

    start = jnp.zeros(scaled.shape[:-1], jnp.float32)
    _, values = lax.scan(step, start, jnp.moveaxis(scaled, -1, 0))
    return _where_usable(jnp.moveaxis(values, 0, -1), nearest)


def _scales(nearest: MXFP4Array) -> jax.Array:
    """Return the scales, float32 [..., K / 32, 1], clipped to normal numbers."""
    return scale_of(clip_byte(nearest.scales.astype(jnp.int32)))[..., None]


def _where_usable(values: jax.Array, nearest: MXFP4Array) -> MXFP4Array:
    """Pack values [..., K / 32, 32] where `_scales` gave the true scale, else keep `nearest`."""
    usable = (nearest.scales >= MIN_BYTE) & (nearest.scales <= E8M0_MAX_FINITE)
    values = jnp.where(usable[..., None], values, np.float32(0))
    flat = values.reshape(*values.shape[:-2], values.shape[-2] * BLOCK_SIZE)
    blocks = pack(flat, nearest.scales).blocks
    return MXFP4Array(jnp.where(usable[..., None], blocks, nearest.blocks), nearest.scales)

"""The small pieces of a transformer block: linear, embedding, RMSNorm and rotary embedding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jax_mxfp4 import ops
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.models.gpt_oss.config import GptOssConfig, YarnScaling
from jax_mxfp4.models.gpt_oss.params import Linear, Weight
from jax_mxfp4.ops import Implementation

# Routers of up to 64 tokens: a dot would be padded, cut along K and added up in four kernels.
_FEW_SUMS = 2048


def linear(
    x: jax.Array,
    weight: Weight,
    bias: jax.Array | None = None,
    *,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Return x @ weight.T + bias with float32 accumulation and one rounding to `out_dtype`.

    Args:
      x: floating point [..., K].
      weight: dense [N, K] in x's dtype, or packed [N, K].
      bias: [N], or None.
      out_dtype: default x.dtype.
      implementation: of `jax_mxfp4.matmul`, where `weight` is packed.
    """
    if isinstance(weight, MXFP4Array):
        return ops.matmul(x, weight, bias=bias, out_dtype=out_dtype, implementation=implementation)
    rows = x.size // x.shape[-1]
    if rows == 1 or rows * weight.shape[0] <= _FEW_SUMS:
        y = _sums(x, weight)
    else:
        y = lax.dot_general(
            x,
            weight,
            (((x.ndim - 1,), (1,)), ((), ())),
            # Without it float32 means TF32 on GPUs with tensor cores.
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype or x.dtype)


def _sums(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return x @ weight.T in float32, written as sums of products.

    For one row, reading the matrix is all that costs. Of this XLA makes one kernel that reads as
    fast as the memory allows, 2880 x 2880 in 6.9 us on an H100, and that writes no float32 copy of
    the matrix; on two CPU cores, 5120 x 2880 in bfloat16 take 3 ms, as a dot 30 ms.
    """
    # Flat, because XLA's CPU compiler of jaxlib 0.10.2 broadcasts [1, T, 1, K] wrongly here.
    flat = x.reshape(-1, 1, x.shape[-1])
    products = flat.astype(jnp.float32) * weight.astype(jnp.float32)
    return jnp.sum(products, axis=-1).reshape(*x.shape[:-1], -1)


def queries_keys_values(
    x: jax.Array, qkv: Linear, config: GptOssConfig, *, implementation: Implementation = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Project x [B, T, D] to queries, keys and values.

    Returns:
      x.dtype [B, T, heads, head_dim] and twice [B, T, kv heads, head_dim].
    """
    y = linear(x, qkv.weight, qkv.bias, implementation=implementation)
    by_head = y.reshape(*x.shape[:2], -1, config.head_dim)
    keys = config.num_attention_heads
    values = keys + config.num_key_value_heads
    return by_head[:, :, :keys], by_head[:, :, keys:values], by_head[:, :, values:]


def embed(
    tokens: jax.Array, embedding: Weight, dtype: DTypeLike, *, implementation: Implementation = None
) -> jax.Array:
    """Return the rows `tokens` of `embedding` [V, D] in `dtype`.

    Ids outside [-V, V) give rows of NaN and negative ones count from the end, as in `jnp.take`.
    """
    if isinstance(embedding, MXFP4Array):
        return ops.take(embedding, tokens, dtype=dtype, implementation=implementation)
    return jnp.take(embedding, tokens, axis=0).astype(dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Return x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normalized = wide * lax.rsqrt(mean_square + np.float32(eps))
    return (normalized * scale.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: GptOssConfig) -> tuple[np.ndarray, float]:
    """Return the rotary frequencies, float32 [head_dim / 2], and the scale of cosine and sine.

    With YaRN (arXiv:2309.00071, section 3.2) dimensions that turn often keep their frequency,
    slow ones are divided by the factor, and a linear ramp joins the two. GPT-OSS leaves the ends
    of the ramp fractional; only where the configuration says `truncate` are they rounded.
    """
    half = config.head_dim // 2
    plain = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return plain.astype(np.float32), 1.0
    low, high = _yarn_range(half, config.rope_theta, scaling)
    ramp = np.clip((np.arange(half, dtype=np.float64) - low) / max(high - low, 1e-3), 0, 1)
    frequencies = plain / scaling.factor * ramp + plain * (1 - ramp)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies.astype(np.float32), attention_factor


def _yarn_range(half: int, theta: float, scaling: YarnScaling) -> tuple[float, float]:
    """Return the dimensions that make beta_fast and beta_slow turns over the original context."""
    low, high = (
        half
        * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
        / math.log(theta)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, 2 * half - 1)


def rotations(positions: jax.Array, config: GptOssConfig) -> tuple[jax.Array, jax.Array]:
    """Return the scaled cosines and sines of positions int32 [B, T], float32 [B, T, head_dim / 2].

    All layers rotate alike: compute them once.
    """
    frequencies, scale = rope_frequencies(config)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * np.float32(scale), jnp.sin(angles) * np.float32(scale)


def rope(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the two halves of each head by its position's angles, in float32.

    Args:
      x: [B, T, heads, head_dim].
      rotation: from `rotations`.

    Returns:
      x.dtype [B, T, heads, head_dim].
    """
    cos, sin = (table[:, :, None] for table in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)

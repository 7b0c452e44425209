"""Softmax attention with sinks and grouped query heads."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mxfp4.models.gpt_oss.config import LayerType


def causal_mask(length: int, window: int | None) -> jax.Array:
    """Return which positions each query of a sequence sees: bool [1, T, T].

    Args:
      length: T.
      window: the query's own position and window - 1 before it; None for all before it.
    """
    query = lax.broadcasted_iota(jnp.int32, (1, length, length), 1)
    key = lax.broadcasted_iota(jnp.int32, (1, length, length), 2)
    seen = key <= query
    if window is not None:
        seen &= query - key < window
    return seen


def window_of(kind: LayerType, sliding_window: int) -> int | None:
    """Return how many positions a layer of this kind sees; None for all."""
    return sliding_window if kind == "sliding_attention" else None


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, mask: jax.Array
) -> jax.Array:
    """Attend with one extra logit per head, the sink, that takes probability but adds no value.

    For query head h and its key head h // (H / KV)::

        p = softmax([q k^T / sqrt(head_dim), sinks[h]])     (float32)
        out = p[:-1] v

    Source: `sdpa` in gpt_oss/torch/model.py of openai/gpt-oss.

    Args:
      q: [B, T, H, head_dim].
      k: [B, S, KV, head_dim].
      v: [B, S, KV, head_dim].
      sinks: [H].
      mask: bool [B or 1, T, S], true where a query sees a key. Keys that are not seen must be
        finite all the same: their weight is zero, and zero times NaN is NaN.

    Returns:
      q.dtype [B, T, H, head_dim].
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum(
        "btngd,bsnd->bngts",
        q,
        k,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    ) * np.float32(head_dim**-0.5)
    scores = jnp.where(mask[:, None, None], scores, np.float32(-np.inf))
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
    # The sink is finite, so that the difference is never inf - inf.
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top)
    out = jnp.einsum(
        "bngts,bsnd->btngd",
        (weights / total).astype(v.dtype),
        v,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(batch, length, heads, head_dim).astype(q.dtype)

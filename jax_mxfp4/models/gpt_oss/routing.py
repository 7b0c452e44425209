"""Choosing experts: the largest of a few logits, without sorting them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def top_experts(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the `count` largest logits and their experts, those that `lax.top_k` finds.

    Every expert's rank is how many others come before it: E x E comparisons, which XLA makes one
    kernel on GPUs, and the selection another one. Sorting would be done by a kernel that takes
    longer than both, and copies before and after it.

    Args:
      logits: float32 [..., E].
      count: 1 to E.

    Returns:
      float32 [..., count], the largest first; int32 [..., count]. Of equal logits the expert with
      the lower number comes first; a NaN is larger than anything else.
    """
    experts = np.arange(logits.shape[-1], dtype=np.int32)
    keys = _ordered(logits)
    mine, other = keys[..., :, None], keys[..., None, :]
    before = (other > mine) | ((other == mine) & (experts < experts[:, None]))
    rank = jnp.sum(before, axis=-1, dtype=jnp.int32)
    # Exactly one expert has each rank: the sums are of one term.
    chosen = rank[..., None, :] == np.arange(count, dtype=np.int32)[:, None]
    values = jnp.sum(jnp.where(chosen, logits[..., None, :], np.float32(0)), axis=-1)
    return values, jnp.sum(jnp.where(chosen, experts, np.int32(0)), axis=-1)


def _ordered(x: jax.Array) -> jax.Array:
    """Return int32 in the total order of float32 x, in which `lax.top_k` compares: -0 < +0 < NaN.

    The bits of positive numbers are in order as they are, those of negative ones are reversed.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))

"""Choosing the next token from logits."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def greedy(logits: jax.Array) -> jax.Array:
    """Return the most likely token of each row, the lowest id on ties: [B, V] -> int32 [B]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array | None
) -> jax.Array:
    """Draw one token per row from the nucleus of softmax(logits / temperature).

    The nucleus (arXiv:1904.09751) is the smallest set of most likely tokens whose probabilities
    add up to `top_p` or more; it always has one token. Equally likely tokens enter it by id.

    Args:
      logits: float32 [B, V].
      keys: one key for each row [B].
      temperature: float32 scalar above 0.
      top_p: float32 scalar in (0, 1]; None draws from all tokens and saves sorting them.

    Returns:
      int32 [B].
    """
    draw = jax.vmap(jax.random.categorical)
    if top_p is None:
        return draw(keys, logits / temperature).astype(jnp.int32)
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = lax.cumsum(probabilities, axis=1) - probabilities
    # The sum of all probabilities may exceed 1 by rounding; top_p = 1 means every token.
    inside = (before < top_p) | (top_p >= 1)
    inside = inside.at[:, 0].set(True)
    nucleus = jnp.where(inside, ranked, np.float32(-np.inf))
    rank = draw(keys, nucleus)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

"""The key-value cache: a ring of slots per layer."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_mxfp4.models.gpt_oss.attention import window_of
from jax_mxfp4.models.gpt_oss.config import GptOssConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the positions that later queries can see.

    Position p of a sequence is in slot p % slots of each layer. A sliding layer has no more slots
    than its window, so that a new position takes the place of the one that leaves the window; a
    full layer has max_len.

    Attributes:
      keys: for each layer [B, slots, kv heads, head_dim].
      values: likewise.
      lengths: int32 [B], how many positions of each sequence have been written.
      max_len: how many positions a sequence can have.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array
    max_len: int = field(metadata={"static": True})


def init_cache(config: GptOssConfig, batch: int, max_len: int, dtype: DTypeLike) -> KVCache:
    """Return an empty cache for `batch` sequences of at most `max_len` positions.

    Raises:
      ValueError: batch or max_len is below 1, or max_len beyond the model's longest sequence.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, found {batch}")
    if not 1 <= max_len <= config.max_position_embeddings:
        raise ValueError(
            f"max_len: expected 1 to {config.max_position_embeddings}, the model's longest "
            f"sequence, found {max_len}"
        )
    shapes = [
        (
            batch,
            min(max_len, window_of(kind, config.sliding_window) or max_len),
            config.num_key_value_heads,
            config.head_dim,
        )
        for kind in config.layer_types
    ]
    return KVCache(
        tuple(jnp.zeros(shape, dtype) for shape in shapes),
        tuple(jnp.zeros(shape, dtype) for shape in shapes),
        jnp.zeros(batch, jnp.int32),
        max_len,
    )


def slot_positions(lengths: jax.Array, slots: int) -> jax.Array:
    """Return the position held by each slot once `lengths` positions are written.

    Args:
      lengths: int32 [B], at least 1.
      slots: size of the ring.

    Returns:
      int32 [B, slots]; negative where a slot has not been written.
    """
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots


def fill(cache: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """Return a layer's slots after a prompt, right padded, has been written to them.

    Args:
      cache: [B, slots, kv heads, head_dim]; slots without a position keep what they hold.
      new: keys or values of all prompt positions [B, T, kv heads, head_dim].
      lengths: int32 [B], how many of the T positions are no padding.
    """
    positions = slot_positions(lengths, cache.shape[1])[:, :, None, None]
    gathered = jnp.take_along_axis(new, jnp.maximum(positions, 0), axis=1)
    return jnp.where(positions >= 0, gathered, cache)


def append(cache: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """Return a layer's slots with one more position per sequence.

    Args:
      cache: [B, slots, kv heads, head_dim].
      new: key or value of position `lengths` [B, kv heads, head_dim].
      lengths: int32 [B], how many positions are there already.
    """
    batch, slots = cache.shape[:2]
    return cache.at[jnp.arange(batch), lengths % slots].set(new)

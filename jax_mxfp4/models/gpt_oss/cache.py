"""The key-value cache: a ring of slots per layer."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jax_mxfp4.models.gpt_oss.attention import window_of
from jax_mxfp4.models.gpt_oss.config import GptOssConfig, LayerType
from jax_mxfp4.models.gpt_oss.kv_formats import (
    CacheFormat,
    Rows,
    check_format,
    empty_rows,
    encode_like,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the positions that later queries can see.

    Position p of a sequence is in slot p % slots of each layer. A sliding layer has no more slots
    than its window, so that a new position takes the place of the one that leaves the window; a
    full layer has max_len. Heads come before slots, so that the keys of a head lie together.

    Attributes:
      keys: for each layer [B, kv heads, slots, head_dim], in one of the formats of `kv_formats`.
      values: likewise.
      lengths: int32 [B], how many positions of each sequence have been written.
      max_len: how many positions a sequence can have.
    """

    keys: tuple[Rows, ...]
    values: tuple[Rows, ...]
    lengths: jax.Array
    max_len: int = field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        leaves = jax.tree.leaves((self.keys, self.values))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _slots(config: GptOssConfig, kind: LayerType, max_len: int) -> int:
    return min(max_len, window_of(kind, config.sliding_window) or max_len)


def init_cache(
    config: GptOssConfig,
    batch: int,
    max_len: int,
    dtype: DTypeLike,
    cache_format: CacheFormat = None,
) -> KVCache:
    """Return an empty cache for `batch` sequences of at most `max_len` positions.

    Args:
      config: the model's hyperparameters.
      batch: number of sequences.
      max_len: see `KVCache`.
      dtype: of keys and values where `cache_format` is None.
      cache_format: "fp8" for rows of E4M3 with a scale, "mxfp4" for packed ones, or None.

    Raises:
      ValueError: batch or max_len is below 1, or max_len beyond the model's longest sequence;
        cache_format is unknown or does not fit the size of a head.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, found {batch}")
    if not 1 <= max_len <= config.max_position_embeddings:
        raise ValueError(
            f"max_len: expected 1 to {config.max_position_embeddings}, the model's longest "
            f"sequence, found {max_len}"
        )
    check_format("cache_format", cache_format, config.head_dim)
    shapes = [
        (
            batch,
            config.num_key_value_heads,
            _slots(config, kind, max_len),
            config.head_dim,
        )
        for kind in config.layer_types
    ]
    return KVCache(
        tuple(empty_rows(shape, dtype, cache_format) for shape in shapes),
        tuple(empty_rows(shape, dtype, cache_format) for shape in shapes),
        jnp.zeros(batch, jnp.int32),
        max_len,
    )


def grow(config: GptOssConfig, cache: KVCache, max_len: int) -> KVCache:
    """Return the same sequences in a cache for at least as many positions.

    No position changes its slot: a ring has only been shorter than its window where the cache was,
    and then it has not been used twice.
    """

    def pad(rows: Rows, slots: int) -> Rows:
        def one(leaf: jax.Array) -> jax.Array:
            more = slots - leaf.shape[2]
            return jnp.pad(leaf, [(0, more if axis == 2 else 0) for axis in range(leaf.ndim)])

        return jax.tree.map(one, rows)

    slots = [_slots(config, kind, max_len) for kind in config.layer_types]
    keys, values = (tuple(map(pad, rows, slots)) for rows in (cache.keys, cache.values))
    return KVCache(keys, values, cache.lengths, max_len)


def context_size(length: int, smallest: int, max_len: int) -> int:
    """Return how many slots of a full layer a chunk looks at, where `length` of them are written.

    Every size is a program of its own; they are `smallest` times powers of two, so that there are
    few and attention never covers more than twice what it needs.
    """
    if length == 0:
        return 0
    size = smallest
    while size < length:
        size *= 2
    return min(size, max_len)


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


def first_slots(rows: Rows, count: int) -> Rows:
    """Return the first `count` slots of a layer, all of them where there are fewer."""
    return jax.tree.map(lambda leaf: leaf[:, :, :count], rows)


def last_slots(rows: Rows, start: jax.Array, window: int) -> Rows:
    """Return positions start - window to start - 1 of a layer, in this order.

    What stands for positions below 0 is arbitrary; the layer must have slots for all others.
    """
    positions = start - np.int32(window) + jnp.arange(window, dtype=jnp.int32)

    def pick(leaf: jax.Array) -> jax.Array:
        return jnp.take(leaf, positions % np.int32(leaf.shape[2]), axis=2)

    return jax.tree.map(pick, rows)


def write_block(rows: Rows, new: jax.Array, start: jax.Array) -> Rows:
    """Return a full layer's slots with positions start to start + T - 1.

    Args:
      rows: [B, kv heads, slots, head_dim].
      new: keys or values [B, kv heads, T, head_dim]. Those beyond the end of a prompt are written
        too, to slots that nothing reads before they are written again.
      start: int32 scalar, at most slots - T.
    """

    def write(leaf: jax.Array, value: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(leaf, value, start, axis=2)

    return jax.tree.map(write, rows, encode_like(rows, new))


def write_ring(rows: Rows, new: jax.Array, start: jax.Array, lengths: jax.Array) -> Rows:
    """Return a sliding layer's slots after positions start to start + T - 1.

    Args:
      rows: [B, kv heads, slots, head_dim]; slots without a new position keep what they hold.
      new: keys or values [B, kv heads, T, head_dim].
      start: int32 scalar.
      lengths: int32 [B], the length of each prompt; positions from there on are no part of it.
    """
    length = np.int32(new.shape[2])
    slots = jax.tree.leaves(rows)[0].shape[2]
    positions = slot_positions(jnp.minimum(lengths, start + length), slots)
    is_new = positions >= jnp.maximum(start, 0)
    index = jnp.clip(positions - start, 0, length - np.int32(1))

    def write(leaf: jax.Array, value: jax.Array) -> jax.Array:
        expand = (slice(None), None, slice(None), *[None] * (leaf.ndim - 3))
        gathered = jnp.take_along_axis(value, index[expand], axis=2)
        return jnp.where(is_new[expand], gathered, leaf)

    return jax.tree.map(write, rows, encode_like(rows, new))


def append(rows: Rows, new: jax.Array, lengths: jax.Array) -> Rows:
    """Return a layer's slots with one more position per sequence.

    Args:
      rows: [B, kv heads, slots, head_dim].
      new: key or value of position `lengths` [B, kv heads, head_dim].
      lengths: int32 [B], how many positions are there already.
    """

    def write(leaf: jax.Array, value: jax.Array) -> jax.Array:
        batch, heads, slots = leaf.shape[:3]
        slot = (lengths % np.int32(slots))[:, None]
        if batch == 1:  # no scatter is needed
            return lax.dynamic_update_slice_in_dim(leaf, value[:, :, None], slot[0, 0], axis=2)
        index = (np.arange(batch)[:, None], np.arange(heads)[None], slot)
        return leaf.at[index].set(
            value, indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds"
        )

    return jax.tree.map(write, rows, encode_like(rows, new))

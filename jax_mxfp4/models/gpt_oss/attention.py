"""Softmax attention with sinks, sliding windows and grouped query heads.

Nothing here holds the T x T scores of a prompt. Each query sees its keys in parts, such as those of
the prompt and those of the cache, and `merge` weighs the parts against each other and against the
sink::

    total_i  = sum_j exp(score_j - top_i)            over the keys j of part i
    values_i = sum_j exp(score_j - top_i) v_j
    out = sum_i exp(top_i) values_i / (exp(sink) + sum_i exp(top_i) total_i)

which is the softmax over all keys and one more logit per head, the sink, that takes probability but
adds no value. Sources: `sdpa` in gpt_oss/torch/model.py of openai/gpt-oss; the merging of parts is
that of FlashAttention (arXiv:2205.14135, section 3.1).

Shapes: B sequences, T queries, S keys, H query heads, KV key heads, query head h uses key head
h // (H / KV). Keys and values lie as in the cache, [B, KV, S, head_dim].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jax_mxfp4.models.gpt_oss import cudnn
from jax_mxfp4.models.gpt_oss.config import LayerType
from jax_mxfp4.ops import Implementation

# Queries and keys of one step of the blockwise computation: 512 x 512 scores per head.
_BLOCK = 512
# With fewer queries cuDNN is not asked: there is too little to compute for it to matter.
_FLASH_QUERIES = 128
# Windows that are computed together, 2048 queries of GPT-OSS, in at most so many groups.
_WINDOWS = 16
_MOST_GROUPS = 8


# From the indices of queries [T, 1] and of keys [S] to what sees what: bool [T, S].
Sees = Callable[[jax.Array, jax.Array], jax.Array]


class Part(NamedTuple):
    """Attention over some of the keys.

    Attributes:
      values: sum of exponentials times values [B, T, H, head_dim], float32 or the queries' dtype.
      total: sum of exponentials, float32 [B, T, H]; 0 for a query that sees none of the keys.
      top: what exponents are relative to, the largest score, float32 [B, T, H]; -inf for none.
    """

    values: jax.Array
    total: jax.Array
    top: jax.Array

    @property
    def out(self) -> jax.Array:
        """Softmax attention over these keys alone, float32; NaN where there are none."""
        return self.values.astype(jnp.float32) / self.total[..., None]


def window_of(kind: LayerType, sliding_window: int) -> int | None:
    """Return how many positions a layer of this kind sees; None for all."""
    return sliding_window if kind == "sliding_attention" else None


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | np.ndarray) -> Part:
    """Attend to all keys at once; the scores take 4 B T S H bytes.

    Args:
      q: [B, T, H, head_dim].
      k: [B, KV, S, head_dim].
      v: [B, KV, S, head_dim].
      seen: bool [B or 1, T, S], true where a query sees a key. Keys that are not seen must be
        finite all the same: their weight is zero, and zero times NaN is NaN.
    """
    state = _update(_empty(q, k.shape[1]), _by_key_head(q, k.shape[1]), k, v, seen)
    return _finish(*state)


def attend_step(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, sinks: jax.Array
) -> jax.Array:
    """Attend with one query per sequence to the slots of a cache and to the sinks.

    The same as `merge` of one `attend`, in fewer kernels: a step of decoding is made of so little
    work that their number counts.

    Args:
      q: [B, 1, H, head_dim].
      k: [B, KV, S, head_dim].
      v: [B, KV, S, head_dim].
      seen: bool [B, S], true for at least one slot of each sequence; slots that are not seen must
        be finite all the same.
      sinks: [H].

    Returns:
      q.dtype [B, 1, H, head_dim].
    """
    grouped = _by_key_head(q, k.shape[1])[:, :, :, 0]
    scores = _dot("bngd,bnsd->bngs", grouped, k) * np.float32(q.shape[-1] ** -0.5)
    scores = jnp.where(seen[:, None, None], scores, np.float32(-np.inf))
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    # Far above all scores a sink makes this infinite, and the result zero, as it should be.
    sink = jnp.exp(sinks.astype(jnp.float32).reshape(grouped.shape[1:3]) - top)
    total = jnp.sum(weights, axis=-1) + sink
    values = _dot("bngs,bnsd->bngd", weights.astype(v.dtype), v)
    return (values / total[..., None]).astype(q.dtype).reshape(q.shape)


def attend_causal(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: Implementation = None
) -> Part:
    """Attend to the positions up to one's own, S = T.

    On CUDA devices many queries of 16-bit floats go to cuDNN's flash attention, unless
    `implementation` is "reference"; everything else goes block by block, and above the diagonal
    nothing is computed.
    """

    def blockwise(q: jax.Array, k: jax.Array, v: jax.Array) -> Part:
        count = -(-q.shape[1] // _block(q.shape[1]))
        pairs = [(i, j) for i in range(count) for j in range(i + 1)]
        return _attend_blocks(q, k, v, pairs, lambda query, key: key <= query)

    def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> Part:
        return _from_flash(*cudnn.attend_causal(q, k, v))

    if not _uses_flash(q, implementation):
        return blockwise(q, k, v)
    return lax.platform_dependent(q, k, v, cuda=flash, default=blockwise)


def attend_prefix(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
    implementation: Implementation = None,
) -> Part:
    """Attend to the first `length` keys, int32 scalar of 1 to S; as `attend_causal` otherwise."""

    def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array) -> Part:
        queries, keys = (-(-size // _block(size)) for size in (q.shape[1], k.shape[2]))
        pairs = [(i, j) for i in range(queries) for j in range(keys)]
        return _attend_blocks(q, k, v, pairs, lambda query, key: (key < length) & (query >= 0))

    def flash(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array) -> Part:
        return _from_flash(*cudnn.attend_prefix(q, k, v, length))

    if not _uses_flash(q, implementation):
        return blockwise(q, k, v, length)
    return lax.platform_dependent(q, k, v, length, cuda=flash, default=blockwise)


def attend_window(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    before: tuple[jax.Array, jax.Array] | None = None,
    start: jax.Array | int = 0,
    implementation: Implementation = None,
) -> Part:
    """Attend to one's own position and the W - 1 before it.

    Where there is nothing before the queries' own positions, cuDNN is asked as by `attend_causal`.

    Args:
      q: of positions start to start + T - 1 [B, T, H, head_dim].
      k: of the same positions [B, KV, T, head_dim].
      v: likewise.
      window: W.
      before: keys and values of positions start - W to start - 1 [B, KV, W, head_dim]; None where
        there are none.
      start: int32 scalar; keys at negative positions are not seen.
      implementation: see `attend_causal`.
    """

    def windows(q: jax.Array, k: jax.Array, v: jax.Array) -> Part:
        return _attend_windows(q, k, v, window, before, start)

    def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> Part:
        return _from_flash(*cudnn.attend_causal(q, k, v, window))

    if before is not None or not _uses_flash(q, implementation):
        return windows(q, k, v)
    return lax.platform_dependent(q, k, v, cuda=flash, default=windows)


def _attend_windows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int,
    before: tuple[jax.Array, jax.Array] | None,
    start: jax.Array | int,
) -> Part:
    """`attend_window`: positions are cut into windows, and see those of their own and the last."""
    length = q.shape[1]
    old = 0 if before is None else window
    if before is not None:
        k, v = (jnp.concatenate([b, new], axis=2) for b, new in zip(before, (k, v), strict=True))
    if length <= window:
        seen = _in_window(length, old + length, old, window)
        first = jnp.asarray(start, jnp.int32) - np.int32(old)
        exists = first + jnp.arange(old + length, dtype=jnp.int32) >= 0
        part = attend(q, k, v, (seen & exists)[None])
        return part._replace(values=part.values.astype(q.dtype))

    count = -(-length // window)
    queries = _cut(q, 1, window)
    # The window before the first one, of zeros where `before` is None, and those of the queries.
    missing = 0 if before is not None else window
    k, v = (jnp.pad(array, ((0, 0), (0, 0), (missing, 0), (0, 0))) for array in (k, v))
    k, v = (_cut(array, 2, window) for array in (k, v))
    k, v = (jnp.concatenate([array[:-1], array[1:]], axis=3) for array in (k, v))
    first = jnp.arange(-1, count - 1, dtype=jnp.int32) * np.int32(window) + start
    exists = first[:, None] + jnp.arange(2 * window, dtype=jnp.int32) >= 0
    seen = _in_window(window, 2 * window, window, window)

    def one(operands: tuple[jax.Array, ...]) -> Part:
        q, k, v, exists = operands
        return attend(q, k, v, (seen & exists)[None])

    # Unrolled: what a loop collects, XLA would allocate for all layers at the very beginning.
    group = max(_WINDOWS, -(-count // _MOST_GROUPS))
    operands = (queries, k, v, exists)
    parts = [
        jax.vmap(one)(tuple(array[i : i + group] for array in operands))
        for i in range(0, count, group)
    ]

    def join(arrays: list[jax.Array]) -> jax.Array:
        joined = jnp.moveaxis(jnp.concatenate(arrays), 0, 1)
        return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]

    values, total, top = (list(arrays) for arrays in zip(*parts, strict=True))
    return Part(join([array.astype(q.dtype) for array in values]), join(total), join(top))


def _in_window(queries: int, keys: int, offset: int, window: int) -> np.ndarray:
    """Return which keys are among the `window` up to the query's own: bool [queries, keys].

    Query i is at the position of key i + offset.
    """
    distance = np.arange(queries)[:, None] + offset - np.arange(keys)
    return (distance >= 0) & (distance < window)


def merge(parts: Sequence[Part], sinks: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return attention over all parts and the sinks [H]: `dtype` [B, T, H, head_dim]."""
    sink = sinks.astype(jnp.float32)
    # The sink is finite, so that the differences below are never inf - inf.
    top = sink
    for part in parts:
        top = jnp.maximum(top, part.top)
    total = jnp.exp(sink - top)
    values = jnp.zeros(parts[0].values.shape, jnp.float32)
    for part in parts:
        scale = jnp.exp(part.top - top)
        total = total + scale * part.total
        values = values + scale[..., None] * part.values.astype(jnp.float32)
    return (values / total[..., None]).astype(dtype)


def _from_flash(out: jax.Array, lse: jax.Array) -> Part:
    """A part from its softmax and the logarithm of its sum of exponentials."""
    return Part(out, jnp.ones_like(lse), lse)


# A running softmax: largest score and sum of exponentials [B, KV, G, T], weighted sum of values
# [B, KV, G, T, head_dim], where G = H / KV.
_State = tuple[jax.Array, jax.Array, jax.Array]


def _by_key_head(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, head_dim] -> [B, KV, G, T, head_dim]."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    return jnp.moveaxis(grouped, 1, 3)


def _empty(q: jax.Array, kv_heads: int) -> _State:
    batch, length, heads, head_dim = q.shape
    shape = (batch, kv_heads, heads // kv_heads, length)
    low = jnp.full(shape, -jnp.inf, jnp.float32)
    return low, jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, head_dim), jnp.float32)


def _update(
    state: _State, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | np.ndarray
) -> _State:
    """Let queries [B, KV, G, T, head_dim] see more keys."""
    top, total, values = state
    scores = _dot("bngtd,bnsd->bngts", q, k) * np.float32(q.shape[-1] ** -0.5)
    scores = jnp.where(seen[:, None, None], scores, np.float32(-np.inf))
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    # Where no key has been seen yet, the difference would be inf - inf.
    origin = jnp.where(new_top == -jnp.inf, np.float32(0), new_top)
    weights = jnp.exp(scores - origin[..., None])
    kept = jnp.exp(top - origin)
    total = kept * total + jnp.sum(weights, axis=-1)
    added = _dot("bngts,bnsd->bngtd", weights.astype(v.dtype), v)
    return new_top, total, kept[..., None] * values + added


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # Without the precision float32 means TF32 on GPUs with tensor cores.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def _finish(top: jax.Array, total: jax.Array, values: jax.Array) -> Part:
    def by_query(array: jax.Array) -> jax.Array:
        """[B, KV, G, T, ...] -> [B, T, H, ...]."""
        moved = jnp.moveaxis(array, 3, 1)
        return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])

    return Part(by_query(values), by_query(total), by_query(top))


def _uses_flash(q: jax.Array, implementation: Implementation) -> bool:
    _, length, _, head_dim = q.shape
    many = length >= _FLASH_QUERIES
    return implementation != "reference" and many and cudnn.is_usable(q.dtype, head_dim)


def _block(size: int) -> int:
    return min(size, _BLOCK)


def _attend_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, pairs: Sequence[tuple[int, int]], sees: Sees
) -> Part:
    """Attend block by block of queries and of keys.

    Args:
      q, k, v: as for `attend`.
      pairs: which block of queries sees which block of keys; all pairs of a query block in a row.
      sees: applied to indices within the arguments.
    """
    (_, length, heads, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    dtype = q.dtype
    rows, columns = _block(length), _block(keys)
    q = _cut(_by_key_head(q, kv_heads), 3, rows)
    k, v = (_cut(array, 2, columns) for array in (k, v))
    empty = _empty(jnp.zeros((k.shape[1], rows, heads, head_dim), q.dtype), kv_heads)

    def step(carry: tuple[_State, _State], pair: jax.Array) -> tuple[tuple[_State, _State], None]:
        state, done = carry
        i, j, is_first = pair
        state = jax.tree.map(lambda e, s: jnp.where(is_first, e, s), empty, state)
        query = i * np.int32(rows) + jnp.arange(rows, dtype=jnp.int32)[:, None]
        key = j * np.int32(columns) + jnp.arange(columns, dtype=jnp.int32)
        # Keys that only pad the last block are beyond every query and every prefix.
        seen = (sees(query, key) & (key < keys))[None]
        state = _update(state, q[i], k[j], v[j], seen)
        done = jax.tree.map(lambda d, s: lax.dynamic_update_index_in_dim(d, s, i, 0), done, state)
        return (state, done), None

    order = [(i, j, index == 0 or pairs[index - 1][0] != i) for index, (i, j) in enumerate(pairs)]
    done = jax.tree.map(lambda leaf: jnp.zeros((q.shape[0], *leaf.shape), leaf.dtype), empty)
    # Rematerialized, so that reverse mode does not keep the scores of every pair.
    (_, done), _ = lax.scan(
        jax.checkpoint(step, prevent_cse=False), (empty, done), np.asarray(order, np.int32)
    )

    def join(blocks: jax.Array) -> jax.Array:
        joined = jnp.moveaxis(blocks, 0, 3)
        return joined.reshape(*joined.shape[:3], -1, *joined.shape[5:])[:, :, :, :length]

    values, total, top = _finish(*map(join, done))
    return Part(values.astype(dtype), total, top)


def _cut(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Cut an axis into blocks, the last one padded with zeros; the blocks become the first axis."""
    count = -(-array.shape[axis] // size)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, count * size - array.shape[axis])
    shape = (*array.shape[:axis], count, size, *array.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(array, padding).reshape(shape), axis, 0)

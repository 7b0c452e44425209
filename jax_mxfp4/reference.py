"""The definition of each operation in plain `jax.numpy`.

These functions run on every backend, contain no platform choice and check nothing beyond what the
shapes themselves demand; `jax_mxfp4.ops` adds argument checks and the CUDA kernels. All of them
can be traced, batched and differentiated in their floating-point arguments. What reverse mode
keeps is the packed weight, never a decoded copy: decoding is repeated in the backward pass.

Packed weights may have either layout; of a prepared one only what is about to be decoded is brought
into the canonical order, and results are the same bits.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jax_mxfp4 import format as mxfp4_format
from jax_mxfp4.array import MXFP4Array

# Decoding an expert costs about as much as multiplying this many rows with it.
_MIN_TILE_ROWS = 8


def dequantize(w: MXFP4Array, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Decode `w`, in either layout, exactly; see `jax_mxfp4.format.decode`.

    Args:
      w: packed array [..., K].
      dtype: float32, bfloat16 or float16.

    Returns:
      `dtype` [..., K].
    """
    blocks = w.blocks
    if w.layout == "prepared":
        blocks = mxfp4_format.canonical_blocks(blocks)
    return mxfp4_format.decode(blocks, w.scales, dtype)


def take(w: MXFP4Array, ids: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Gather and decode rows of `w`.

    Ids are read as by `jnp.take` in its default mode: -V..-1 count from the end, and any other id
    outside 0..V-1 gives a row of NaN.

    Args:
      w: packed array [V, K].
      ids: any integer dtype, any shape.
      dtype: float32, bfloat16 or float16.

    Returns:
      `dtype` ids.shape + [K].
    """
    w, ids = jax.tree.map(jnp.asarray, (w, ids))
    # Narrow ids cannot hold V; wide ones must not wrap around, so they are compared as they are.
    if ids.dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)
    count = jnp.asarray(w.shape[0], ids.dtype)
    index = jnp.where(ids < 0, ids + count, ids)
    valid = (index >= 0) & (index < count)
    index = jnp.where(valid, index, jnp.zeros_like(index)).astype(jnp.int32)
    # A NaN scale makes the row NaN whatever its codes.
    scales = jnp.where(valid[..., None], w.scales[index], np.uint8(mxfp4_format.E8M0_NAN))
    return dequantize(MXFP4Array(w.blocks[index], scales, w.layout), dtype)


def matmul(
    x: jax.Array,
    w: MXFP4Array,
    bias: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Compute ``x @ dequantize(w).T + bias`` with float32 accumulation.

    Weights are decoded exactly, the bias is added in float32 and the sum is rounded once to
    `out_dtype`. The order of the sum is the backend's (OCP MX v1.0, section 6.2, leaves it open),
    so two implementations agree within ``2 * K * 2 ** -24 * sum_k |x[k] * w[k]|`` before that
    rounding. Backends may treat subnormal products as zero.

    Args:
      x: float32, bfloat16 or float16 [..., K].
      w: packed array [N, K].
      bias: float32, bfloat16 or float16 [N], or None.
      out_dtype: float32, bfloat16 or float16; default x.dtype.

    Returns:
      `out_dtype` [..., N].
    """
    y = _with_bias(_dot(x, w), bias)
    return y.astype(x.dtype if out_dtype is None else out_dtype)


def _decode_and_dot(x: jax.Array, w: MXFP4Array) -> jax.Array:
    """Contract the last axes of x [..., K] and w [N, K] into float32 [..., N]."""
    # bfloat16 holds every weight exactly; float16 does not, so its products are formed in float32.
    dtype = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32
    return lax.dot_general(
        jnp.asarray(x, dtype),
        dequantize(w, dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


# Rematerialized so that the residual of reverse mode is the packed weight.
_dot = jax.checkpoint(_decode_and_dot)


def moe(
    x: jax.Array,
    expert_ids: jax.Array,
    expert_weights: jax.Array,
    gate_up: MXFP4Array,
    gate_up_bias: jax.Array | None,
    down: MXFP4Array,
    down_bias: jax.Array | None,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Apply the GPT-OSS expert layer to routed tokens.

    For each token and each of its k experts e::

        gu   = x @ gate_up[e].T + gate_up_bias[e]            (float32)
        gate = min(gu[0::2], limit)
        up   = clip(gu[1::2], -limit, limit)
        h    = gate * sigmoid(alpha * gate) * (up + 1)       (float32, rounded to x.dtype)
        y_e  = h @ down[e].T + down_bias[e]                  (float32)

    The result is ``sum_j expert_weights[j] * y_{e_j}``, summed in float32 with j ascending and
    rounded once. An id outside 0..E-1 contributes exactly zero, which is what a shard of the
    experts needs. Source: gpt_oss/torch/model.py (MLPBlock, swiglu) of openai/gpt-oss.

    Args:
      x: float32, bfloat16 or float16 [..., T, D].
      expert_ids: int32 [..., T, k].
      expert_weights: floating point [..., T, k].
      gate_up: packed array [E, 2 * I, D]; row 2i is a gate, row 2i + 1 its linear partner.
      gate_up_bias: floating point [E, 2 * I], or None.
      down: packed array [E, D, I].
      down_bias: floating point [E, D], or None.
      alpha: slope inside the sigmoid.
      limit: clamp of gate (above) and linear partner (both sides).
      out_dtype: float32, bfloat16 or float16; default x.dtype.

    Returns:
      `out_dtype` [..., T, D].
    """
    num_experts, top_k = gate_up.shape[0], expert_ids.shape[-1]
    # NumPy weights cannot be indexed by the loop.
    gate_up, down = jax.tree.map(jnp.asarray, (gate_up, down))
    tokens = jnp.asarray(x).reshape(-1, x.shape[-1])
    ids = jnp.asarray(expert_ids).reshape(-1).astype(jnp.int32)
    pairs = ids.shape[0]
    slot, tile_expert, tile_rows = _plan_tiles(ids, num_experts)

    # Everything but the packed weights is gathered before the loop: indexed inside it, each
    # would cost reverse mode a full-sized cotangent per step.
    pair_of_slot = jnp.full(tile_expert.shape[0] * tile_rows, pairs, jnp.int32)
    pair_of_slot = pair_of_slot.at[slot].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    tiles = tokens.at[pair_of_slot // top_k].get(mode="fill", fill_value=0)
    tiles = tiles.reshape(-1, tile_rows, x.shape[-1])
    gate_up_biases = _bias_of_tiles(gate_up_bias, tile_expert)
    down_biases = _bias_of_tiles(down_bias, tile_expert)

    def apply_expert(operands):
        expert, tile, gate_up_bias, down_bias = operands
        gu = _with_bias(_decode_and_dot(tile, gate_up[expert]), gate_up_bias)
        gate = jnp.minimum(gu[:, 0::2], np.float32(limit))
        up = jnp.clip(gu[:, 1::2], np.float32(-limit), np.float32(limit))
        h = gate * jax.nn.sigmoid(np.float32(alpha) * gate) * (up + np.float32(1))
        return _with_bias(_decode_and_dot(h.astype(x.dtype), down[expert]), down_bias)

    @partial(jax.checkpoint, prevent_cse=False)
    def apply_tile(operands):
        def idle(operands):
            # Like the tile, which inside shard_map varies over mesh axes.
            return jnp.zeros_like(operands[1], jnp.float32)

        return lax.cond(operands[0] < num_experts, apply_expert, idle, operands)

    y = lax.map(apply_tile, (tile_expert, tiles, gate_up_biases, down_biases))
    y = y.reshape(-1, x.shape[-1]).at[slot].get(mode="fill", fill_value=0)
    valid = (ids >= 0) & (ids < num_experts)
    weights = jnp.asarray(expert_weights, jnp.float32).reshape(-1, top_k, 1)
    y = weights * y.reshape(-1, top_k, y.shape[-1])
    # Selected, not multiplied by zero, so that even an infinite routing weight adds nothing.
    y = jnp.where(valid.reshape(-1, top_k, 1), y, np.float32(0))
    out = y[:, 0]
    for j in range(1, top_k):
        out = out + y[:, j]
    return out.reshape(x.shape).astype(x.dtype if out_dtype is None else out_dtype)


def _plan_tiles(ids: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, int]:
    """Group (token, expert) pairs by expert into tiles of a fixed number of rows.

    A tile belongs to one expert, so that its weights are decoded once for all rows, and the
    number of tiles suffices for any routing: an expert with c pairs needs ceil(c / tile_rows).

    Args:
      ids: expert of each pair, int32 [P]; ids outside 0..num_experts-1 get no row.
      num_experts: number of experts E.

    Returns:
      slot: row of each pair among the rows of all tiles, int32 [P]; beyond them for no row.
      tile_expert: expert of each tile, int32 [number of tiles]; E for a tile without rows.
      tile_rows: rows of a tile.
    """
    pairs = ids.shape[0]
    expert = jnp.where((ids >= 0) & (ids < num_experts), ids, np.int32(num_experts))
    if not isinstance(pairs, int) or pairs < num_experts:
        # Decoding with few tokens: experts rarely repeat, and one row each needs no sorting.
        slot = jnp.arange(pairs, dtype=jnp.int32)
        return jnp.where(expert < num_experts, slot, jnp.asarray(pairs, jnp.int32)), expert, 1

    # Twice the mean group size: most experts then fit one tile and are decoded once.
    tile_rows = max(_MIN_TILE_ROWS, 2 * pairs // num_experts)
    num_tiles = (pairs + (tile_rows - 1) * num_experts) // tile_rows
    rows = np.int32(tile_rows)
    # The last group, of the pairs without a row, gets no tiles.
    group_size = jnp.zeros(num_experts + 1, jnp.int32).at[expert].add(1)
    group_start = jnp.cumsum(group_size, dtype=jnp.int32) - group_size
    group_tiles = ((group_size + (rows - np.int32(1))) // rows).at[-1].set(0)
    tile_end = jnp.cumsum(group_tiles, dtype=jnp.int32)
    tile_start = tile_end - group_tiles

    order = jnp.argsort(expert, stable=True)
    position = jnp.zeros_like(expert).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    rank = position - group_start[expert]
    slot = tile_start[expert] * rows + rank
    slot = jnp.where(expert < num_experts, slot, np.int32(num_tiles * tile_rows))
    index = jnp.arange(num_tiles, dtype=jnp.int32)
    tile_expert = jnp.searchsorted(tile_end[:-1], index, side="right").astype(jnp.int32)
    return slot, tile_expert, tile_rows


def _bias_of_tiles(bias: jax.Array | None, tile_expert: jax.Array) -> jax.Array | None:
    if bias is None:
        return None
    return jnp.asarray(bias).at[tile_expert].get(mode="fill", fill_value=0)


def _with_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + jnp.asarray(bias, jnp.float32)

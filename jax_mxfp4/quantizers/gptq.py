"""GPTQ with MXFP4 blocks: rounding that lets later columns make up for the error of earlier ones.

For a linear layer with weight W and inputs x the expected squared error of the outputs is
``tr((W - Q) H (W - Q)^T)`` with ``H = sum x x^T``. GPTQ (Frantar et al., arXiv:2210.17323) rounds
one column after the other and adds ``-error / U[k, k] * U[k, j]`` to every later column j, where
``H^-1 = U^T U`` with U upper triangular: the best that the later columns can do about it.

Three things are special to MXFP4:

* A block's scale is chosen when its first column is reached, from weights that already carry the
  compensation for all earlier blocks.
* Blocks stay whole. Columns of large ``H[k, k]`` are best rounded first, while many others can
  still compensate; here the blocks are ordered by the sum of their diagonal and the columns inside
  each block by their own, so that every element stays in its block and nothing is permuted at run
  time.
* With the rule `loss` both scales that can be best, that of `floor` and its double, are carried
  through the whole block, and the one with the smaller ``sum (error / U[k, k])^2``, which is the
  block's share of the objective above, is kept.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.format import BLOCK_SIZE
from jax_mxfp4.quantizers.grid import clip_byte, floor_byte, pack, round_to_e2m1, scale_of

GptqRule = Literal["floor", "even", "mse", "loss"]
"""How `gptq` chooses scales: as `jax_mxfp4.quantize` does, or by the compensated loss."""

GPTQ_RULES: tuple[str, ...] = get_args(GptqRule)


def gptq(
    weight: ArrayLike,
    hessian: ArrayLike,
    *,
    scale_rule: GptqRule = "loss",
    damping: float = 0.01,
    activation_order: bool = True,
) -> MXFP4Array:
    """Pack a weight so that the layer's outputs change little on the calibration inputs.

    Args:
      weight: floating point [N, K], K a multiple of 32.
      hessian: ``sum x x^T`` over inputs x of the layer, [K, K]; its scale does not matter.
      scale_rule: "floor", "even", "mse" or "loss"; see the module.
      damping: share of the mean of H's diagonal that is added to it, above 0. More keeps closer to
        plain rounding. Where the diagonal is all zero (an expert that saw no token) H is taken to
        be the identity.
      activation_order: whether to order blocks and columns; see the module.

    Returns:
      `MXFP4Array` [N, K].

    Raises:
      ValueError: shapes do not fit, values are not finite, or an option is outside its range.
    """
    weight, hessian = np.asarray(weight, np.float32), np.asarray(hessian, np.float64)
    if weight.ndim != 2 or not weight.size or weight.shape[1] % BLOCK_SIZE:
        raise ValueError(
            f"weight: expected [N, K] with K a multiple of {BLOCK_SIZE}, found {weight.shape}"
        )
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian: expected {(columns, columns)}, found {hessian.shape}")
    for name, array in (("weight", weight), ("hessian", hessian)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite values, found NaN or Inf")
    if scale_rule not in GPTQ_RULES:
        raise ValueError(f"scale_rule: expected one of {GPTQ_RULES}, found {scale_rule!r}")
    diagonal = np.diag(hessian)
    order = column_order(diagonal) if activation_order else np.arange(columns)
    factor = _inverse_factor(damped(hessian, damping)[np.ix_(order, order)])
    return _solve(
        jnp.asarray(weight),
        jnp.asarray(factor, jnp.float32),
        jnp.asarray(order, jnp.int32),
        scale_rule=scale_rule,
    )


def column_order(diagonal: np.ndarray) -> np.ndarray:
    """Return the order in which columns are rounded, int [K]: whole blocks, largest first."""
    blocks = diagonal.reshape(-1, BLOCK_SIZE)
    within = np.argsort(-blocks, axis=1, kind="stable")
    first = np.argsort(-blocks.sum(axis=1), kind="stable")
    return (first[:, None] * BLOCK_SIZE + within[first]).reshape(-1)


def damped(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Return `hessian` plus `damping` times the mean of its diagonal, float64 [K, K].

    Raises:
      ValueError: `damping` is not above 0, or the diagonal of `hessian` is negative.
    """
    if not 0 < damping < np.inf:
        raise ValueError(f"damping: expected a number above 0, found {damping}")
    diagonal = np.diag(hessian)
    if diagonal.min() < 0:
        raise ValueError(f"hessian: expected no negative diagonal, found {diagonal.min()}")
    if not diagonal.any():
        return np.eye(len(hessian))
    return hessian + damping * diagonal.mean() * np.eye(len(hessian))


def _inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Return upper triangular U with U^T U = hessian^-1."""
    # A Cholesky factor of the reversed matrix, reversed, is an upper one: hessian = M M^T.
    lower = np.linalg.cholesky(hessian[::-1, ::-1])
    return np.triu(np.linalg.inv(lower[::-1, ::-1]))


@partial(jax.jit, static_argnames="scale_rule")
def _solve(
    weight: jax.Array, factor: jax.Array, order: jax.Array, *, scale_rule: GptqRule
) -> MXFP4Array:
    """Round weight [N, K] in the order int32 [K] of columns, for which factor [K, K] is made."""
    rows, columns = weight.shape

    def step(block: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        weight, values, scales = state
        start = block * np.int32(BLOCK_SIZE)
        current = lax.dynamic_slice(weight, (0, start), (rows, BLOCK_SIZE))
        later = lax.dynamic_slice(factor, (start, 0), (BLOCK_SIZE, columns))
        own = lax.dynamic_slice(later, (0, start), (BLOCK_SIZE, BLOCK_SIZE))
        chosen, errors, byte = _round_block(current, own, scale_rule)
        # The factor is zero before the block, so that finished columns do not change.
        weight = weight - jnp.dot(errors, later, precision=lax.Precision.HIGHEST)
        values = lax.dynamic_update_slice(values, chosen, (0, start))
        return weight, values, lax.dynamic_update_index_in_dim(scales, byte, block, 1)

    groups = columns // BLOCK_SIZE
    empty = (jnp.zeros_like(weight), jnp.zeros((rows, groups), jnp.int32))
    _, values, scales = lax.fori_loop(0, groups, step, (weight[:, order], *empty))
    # Blocks moved as a whole, and columns inside them.
    back = jnp.argsort(order)
    return pack(values[:, back], scales[:, back[::BLOCK_SIZE] // np.int32(BLOCK_SIZE)])


def _round_block(
    weight: jax.Array, factor: jax.Array, scale_rule: GptqRule
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the values [N, 32], the errors divided by U's diagonal [N, 32] and the bytes [N]."""
    amax = jnp.max(jnp.abs(weight), axis=1)
    smaller = floor_byte(amax)
    bytes_ = jnp.stack([smaller, clip_byte(smaller + 1)])
    scales = scale_of(bytes_)[..., None]
    candidates = jnp.broadcast_to(weight, (2, *weight.shape))

    def column(k: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        current, values, errors = state
        x = lax.dynamic_slice_in_dim(current, k, 1, 2)
        row = lax.dynamic_index_in_dim(factor, k, 0, keepdims=False)
        value = round_to_e2m1(x / scales)
        error = (x - value * scales) / row[k]
        return (
            current - error * row,
            lax.dynamic_update_slice_in_dim(values, value, k, 2),
            lax.dynamic_update_slice_in_dim(errors, error, k, 2),
        )

    zeros = jnp.zeros_like(candidates)
    _, values, errors = lax.fori_loop(0, BLOCK_SIZE, column, (candidates, zeros, zeros))
    if scale_rule == "loss":
        losses = jnp.sum(jnp.square(errors), axis=-1)
        larger = losses[1] < losses[0]
    elif scale_rule == "mse":
        plain = jnp.sum(jnp.square(weight - round_to_e2m1(weight / scales) * scales), axis=-1)
        larger = plain[1] < plain[0]
    else:
        limit = np.float32(7 if scale_rule == "even" else np.inf)
        larger = amax >= limit * scales[0, :, 0]
    which = larger[:, None]
    return (
        jnp.where(which, values[1], values[0]),
        jnp.where(which, errors[1], errors[0]),
        jnp.where(larger, bytes_[1], bytes_[0]),
    )

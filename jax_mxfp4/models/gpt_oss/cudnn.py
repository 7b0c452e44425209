"""cuDNN's flash attention on CUDA devices, with the logarithm of its sums.

`jax.nn.dot_product_attention(implementation="cudnn", return_residual=True)` rounds that logarithm
to the dtype of the queries: in bfloat16 it would be off by up to 2 %, and so would the share of a
sink. The function below it, which is not part of JAX's public interface, returns it in float32.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def is_usable(dtype: np.dtype, head_dim: int) -> bool:
    """Whether programs of this process may call it.

    It can be traced only where JAX runs on CUDA, which it does with cuDNN, and has kernels for
    16-bit floats and heads of up to 128 elements, a multiple of 8.
    """
    fits = dtype in _DTYPES and head_dim <= 128 and head_dim % 8 == 0
    return fits and "cuda" in jax.devices()[0].client.platform_version


def attend_causal(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attend to the positions up to one's own, all of them or the last `window`.

    Args:
      q: bfloat16 or float16 [B, T, H, head_dim].
      k: [B, KV, T, head_dim].
      v: [B, KV, T, head_dim].
      window: how many positions are seen, one's own included.

    Returns:
      q.dtype [B, T, H, head_dim]; logarithm of the sums of exponentials, float32 [B, T, H].
    """
    return _flash(q, k, v, None, MaskType.CAUSAL, window)


def attend_prefix(
    q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attend to the first `length` (int32 scalar, at least 1) keys of [B, KV, S, head_dim]."""
    return _flash(q, k, v, length, MaskType.PADDING)


def _flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array | None,
    mask_type: MaskType,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    batch, queries, _, head_dim = q.shape
    # Queries and keys must lie alike; the transposes cancel those that made [B, KV, S, head_dim].
    k, v = (jnp.swapaxes(array, 1, 2) for array in (k, v))
    limits = {}
    if length is not None:
        limits["q_seqlen"] = jnp.full(batch, queries, jnp.int32)
        limits["kv_seqlen"] = jnp.broadcast_to(length.astype(jnp.int32), (batch,))
    result = dot_product_attention(
        q,
        k,
        v,
        **limits,
        scale=head_dim**-0.5,
        mask_type=mask_type,
        sliding_window_length=window,
        return_residual=True,
    )
    out, lse = cast(tuple[jax.Array, jax.Array], result)
    return out, jnp.swapaxes(lse, 1, 2)

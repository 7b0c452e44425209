"""The forward computations of GPT-OSS as pure functions of the parameters.

One backbone serves the full forward pass, the prefill and the decoding step; they differ in how a
layer's queries meet the keys, which each passes in as `attend`. Layers are unrolled: a scan would
copy every layer's weights out of a stacked array before the kernels could read them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mxfp4 import ops
from jax_mxfp4.models.gpt_oss import attention
from jax_mxfp4.models.gpt_oss import cache as kv
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.models.gpt_oss.kv_formats import decode_rows
from jax_mxfp4.models.gpt_oss.layers import (
    embed,
    linear,
    queries_keys_values,
    rms_norm,
    rope,
    rotations,
)
from jax_mxfp4.models.gpt_oss.params import MLP, Attention, Params
from jax_mxfp4.models.gpt_oss.routing import top_experts
from jax_mxfp4.ops import Implementation

# (layer index, queries [B, T, H, head_dim], keys and values [B, KV, T, head_dim]) -> attended
# values [B, T, H, head_dim].
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
Captures = tuple[dict[str, jax.Array], ...]


def full_forward(
    params: Params,
    tokens: jax.Array,
    router_indices: Sequence[jax.Array] | None,
    *,
    config: GptOssConfig,
    implementation: Implementation,
) -> tuple[jax.Array, Captures]:
    """Return the logits of every position, float32 [B, T, V], and what each layer computed.

    Args:
      params: the model's parameters.
      tokens: int32 [B, T].
      router_indices: for each layer the experts to use, int32 [B, T, k], in place of the router's
        choice; None to let the routers choose.
      config: the model's hyperparameters.
      implementation: of the packed operations.
    """

    def attend(index: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        window = attention.window_of(config.layer_types[index], config.sliding_window)
        if window is None:
            part = attention.attend_causal(q, k, v, implementation)
        else:
            part = attention.attend_window(q, k, v, window, implementation=implementation)
        return attention.merge([part], params.layers[index].attention.sinks, q.dtype)

    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    x, captures = _backbone(
        params, tokens, positions, attend, router_indices, config, implementation
    )
    return _logits(params, x, implementation), captures


def prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: kv.KVCache,
    start: jax.Array,
    logits: jax.Array | None,
    *,
    context: int,
    config: GptOssConfig,
    implementation: Implementation,
) -> tuple[jax.Array, kv.KVCache]:
    """Process a chunk of right-padded prompts: positions start to start + T - 1.

    Args:
      params: the model's parameters.
      tokens: int32 [B, T], the prompts' tokens at these positions.
      lengths: int32 [B], the whole length of each prompt, at least 1.
      cache: with positions 0 to start - 1.
      start: int32 scalar, at most cache.max_len - T.
      logits: what the chunk before returned, None for the first.
      context: 0 for the first chunk, which overwrites the cache, otherwise at least `start`: of
        how many slots of the full layers the queries are compared with.
      config: the model's hyperparameters.
      implementation: of the packed operations.

    Returns:
      The logits after the last token of each prompt that ends in this chunk or before it,
      float32 [B, V], and the cache.
    """
    keys: list[kv.Rows] = []
    values: list[kv.Rows] = []

    def attend(index: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        old = cache.keys[index], cache.values[index]

        def earlier(select: Callable[[kv.Rows], kv.Rows]) -> tuple[jax.Array, jax.Array]:
            k, v = (decode_rows(select(rows), q.dtype, implementation) for rows in old)
            return k, v

        window = attention.window_of(config.layer_types[index], config.sliding_window)
        if window is None:
            parts = [attention.attend_causal(q, k, v, implementation)]
            if context:
                prefix = earlier(lambda rows: kv.first_slots(rows, context))
                parts.append(attention.attend_prefix(q, *prefix, start, implementation))
            write = partial(kv.write_block, start=start)
        else:
            before = None
            if context:
                before = earlier(lambda rows: kv.last_slots(rows, start, window))
            parts = [attention.attend_window(q, k, v, window, before, start, implementation)]
            write = partial(kv.write_ring, start=start, lengths=lengths)
        attended = attention.merge(parts, params.layers[index].attention.sinks, q.dtype)
        # The next layer waits for the cache. XLA would write it at the very end, and keep what it
        # takes keys and values from until then: 170 MB a layer of gpt-oss-20b for 8192 tokens.
        attended, *written = lax.optimization_barrier(
            (attended, write(old[0], k), write(old[1], v))
        )
        for rows, new in zip((keys, values), written, strict=True):
            rows.append(new)
        return attended

    length = np.int32(tokens.shape[1])
    positions = start + jnp.arange(length, dtype=jnp.int32)[None]
    x, _ = _backbone(params, tokens, positions, attend, None, config, implementation)
    index = jnp.clip(lengths - 1 - start, 0, length - np.int32(1))
    last = jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
    found = _logits(params, last, implementation)
    if logits is not None:
        found = jnp.where((lengths > start)[:, None], found, logits)
    return found, kv.KVCache(tuple(keys), tuple(values), lengths, cache.max_len)


def decode_step(
    params: Params,
    tokens: jax.Array,
    cache: kv.KVCache,
    *,
    config: GptOssConfig,
    implementation: Implementation,
) -> tuple[jax.Array, kv.KVCache]:
    """Return the logits after one more token per sequence, float32 [B, V], and the grown cache.

    A sequence that already fills the cache gets NaN logits. Queries are compared with all slots,
    written or not: a cache that is much longer than its sequences costs time, see `kv.grow`.

    Args:
      params: the model's parameters.
      tokens: int32 [B].
      cache: of the positions so far.
      config: the model's hyperparameters.
      implementation: of the packed operations.
    """
    keys: list[kv.Rows] = []
    values: list[kv.Rows] = []

    def attend(index: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        keys.append(kv.append(cache.keys[index], k[:, :, 0], cache.lengths))
        values.append(kv.append(cache.values[index], v[:, :, 0], cache.lengths))
        k, v = (decode_rows(rows[index], q.dtype, implementation) for rows in (keys, values))
        # Every written slot is inside the window: a sliding layer has no slots for older ones.
        seen = kv.slot_positions(cache.lengths + 1, k.shape[2]) >= 0
        return attention.attend_step(q, k, v, seen, params.layers[index].attention.sinks)

    x, _ = _backbone(
        params, tokens[:, None], cache.lengths[:, None], attend, None, config, implementation
    )
    logits = _logits(params, x[:, 0], implementation)
    logits = jnp.where(cache.lengths[:, None] < cache.max_len, logits, jnp.float32(jnp.nan))
    grown = kv.KVCache(tuple(keys), tuple(values), cache.lengths + 1, cache.max_len)
    return logits, grown


def _backbone(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    router_indices: Sequence[jax.Array] | None,
    config: GptOssConfig,
    implementation: Implementation,
) -> tuple[jax.Array, Captures]:
    """Return the hidden states after the final norm, [B, T, D], and what each layer computed.

    Positions are int32 [B or 1, T].
    """
    x = embed(tokens, params.embedding, params.norm.dtype, implementation=implementation)
    rotation = rotations(positions, config)
    captures = []
    for index, layer in enumerate(params.layers):
        attended = _attention_block(
            layer.attention, x, rotation, attend, index, config, implementation
        )
        x = x + attended
        forced = None if router_indices is None else router_indices[index]
        routed, capture = _expert_block(layer.mlp, x, forced, config, implementation)
        x = x + routed
        captures.append({"attn_out": attended, **capture, "hidden": x})
    return rms_norm(x, params.norm, config.rms_norm_eps), tuple(captures)


def _attention_block(
    params: Attention,
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    attend: Attend,
    index: int,
    config: GptOssConfig,
    implementation: Implementation,
) -> jax.Array:
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    q, k, v = queries_keys_values(normed, params.qkv, config, implementation=implementation)
    q, k = rope(q, rotation), rope(k, rotation)
    attended = attend(index, q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2))
    flat = attended.reshape(*x.shape[:2], -1)
    return linear(flat, params.out.weight, params.out.bias, implementation=implementation)


def _expert_block(
    params: MLP,
    x: jax.Array,
    forced: jax.Array | None,
    config: GptOssConfig,
    implementation: Implementation,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    # Unrounded logits: near ties between experts are decided as exactly as the input allows.
    logits = linear(
        normed,
        params.router.weight,
        params.router.bias,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    if forced is None:
        chosen, indices = top_experts(logits, config.experts_per_token)
    else:
        chosen, indices = jnp.take_along_axis(logits, forced, axis=-1), forced
    weights = jax.nn.softmax(chosen, axis=-1)
    routed = ops.moe(
        normed,
        indices,
        weights,
        params.gate_up,
        params.gate_up_bias,
        params.down,
        params.down_bias,
        alpha=config.swiglu_alpha,
        limit=config.swiglu_limit,
        implementation=implementation,
    )
    capture = {
        "router_logits": logits,
        "router_indices": indices,
        "router_weights": weights,
        "mlp_out": routed,
    }
    return routed, capture


def _logits(params: Params, x: jax.Array, implementation: Implementation) -> jax.Array:
    return linear(x, params.unembedding, out_dtype=jnp.float32, implementation=implementation)

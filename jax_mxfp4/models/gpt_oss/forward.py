"""The forward computations of GPT-OSS as pure functions of the parameters.

One backbone serves the full forward pass, the prefill and the decoding step; they differ in how a
layer's queries meet the keys, which each passes in as `attend`. Layers are unrolled: a scan would
copy every layer's weights out of a stacked array before the kernels could read them.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jax_mxfp4 import ops
from jax_mxfp4.models.gpt_oss import cache as kv
from jax_mxfp4.models.gpt_oss.attention import attention, causal_mask, window_of
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.models.gpt_oss.layers import embed, linear, rms_norm, rope
from jax_mxfp4.models.gpt_oss.params import MLP, Attention, Params
from jax_mxfp4.ops import Implementation

# (layer index, q, k, v) -> attended values, all [B, T, heads, head_dim].
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
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    attend = _attend_to_prompt(params, length, config)
    x, captures = _backbone(
        params, tokens, positions, attend, router_indices, config, implementation
    )
    return _logits(params, x, implementation), captures


def prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: kv.KVCache,
    *,
    config: GptOssConfig,
    implementation: Implementation,
) -> tuple[jax.Array, kv.KVCache]:
    """Return the logits after each prompt's last token, float32 [B, V], and the filled cache.

    Args:
      params: the model's parameters.
      tokens: int32 [B, T], right padded.
      lengths: int32 [B], 1 to T.
      cache: overwritten from position 0.
      config: the model's hyperparameters.
      implementation: of the packed operations.
    """
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    attend_to_prompt = _attend_to_prompt(params, length, config)
    keys: list[jax.Array] = []
    values: list[jax.Array] = []

    def attend(index: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        keys.append(kv.fill(cache.keys[index], k, lengths))
        values.append(kv.fill(cache.values[index], v, lengths))
        return attend_to_prompt(index, q, k, v)

    x, _ = _backbone(params, tokens, positions, attend, None, config, implementation)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    filled = kv.KVCache(tuple(keys), tuple(values), lengths, cache.max_len)
    return _logits(params, last, implementation), filled


def decode_step(
    params: Params,
    tokens: jax.Array,
    cache: kv.KVCache,
    *,
    config: GptOssConfig,
    implementation: Implementation,
) -> tuple[jax.Array, kv.KVCache]:
    """Return the logits after one more token per sequence, float32 [B, V], and the grown cache.

    A sequence that already fills the cache gets NaN logits.

    Args:
      params: the model's parameters.
      tokens: int32 [B].
      cache: of the positions so far.
      config: the model's hyperparameters.
      implementation: of the packed operations.
    """
    keys: list[jax.Array] = []
    values: list[jax.Array] = []

    def attend(index: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        keys.append(kv.append(cache.keys[index], k[:, 0], cache.lengths))
        values.append(kv.append(cache.values[index], v[:, 0], cache.lengths))
        # Every written slot is inside the window: a sliding layer has no slots for older ones.
        seen = kv.slot_positions(cache.lengths + 1, keys[index].shape[1]) >= 0
        sinks = params.layers[index].attention.sinks
        return attention(q, keys[index], values[index], sinks, seen[:, None, :])

    x, _ = _backbone(
        params, tokens[:, None], cache.lengths[:, None], attend, None, config, implementation
    )
    logits = _logits(params, x[:, 0], implementation)
    logits = jnp.where(cache.lengths[:, None] < cache.max_len, logits, jnp.float32(jnp.nan))
    grown = kv.KVCache(tuple(keys), tuple(values), cache.lengths + 1, cache.max_len)
    return logits, grown


def _attend_to_prompt(params: Params, length: int, config: GptOssConfig) -> Attend:
    """Return an `attend` in which the given positions are all there are."""
    windows = [window_of(kind, config.sliding_window) for kind in config.layer_types]
    masks = {window: causal_mask(length, window) for window in set(windows)}

    def attend(index: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, params.layers[index].attention.sinks, masks[windows[index]])

    return attend


def _backbone(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    router_indices: Sequence[jax.Array] | None,
    config: GptOssConfig,
    implementation: Implementation,
) -> tuple[jax.Array, Captures]:
    """Return the hidden states after the final norm, [B, T, D], and what each layer computed."""
    x = embed(tokens, params.embedding, params.norm.dtype, implementation=implementation)
    captures = []
    for index, layer in enumerate(params.layers):
        attended = _attention_block(
            layer.attention, x, positions, attend, index, config, implementation
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
    positions: jax.Array,
    attend: Attend,
    index: int,
    config: GptOssConfig,
    implementation: Implementation,
) -> jax.Array:
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    q, k, v = (
        linear(normed, part.weight, part.bias, implementation=implementation).reshape(
            *x.shape[:2], -1, config.head_dim
        )
        for part in (params.q, params.k, params.v)
    )
    attended = attend(index, rope(q, positions, config), rope(k, positions, config), v)
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
        chosen, indices = jax.lax.top_k(logits, config.experts_per_token)
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

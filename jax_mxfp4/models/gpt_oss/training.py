"""GPT-OSS for training: the experts are rounded to MXFP4 in every forward pass.

Gradients pass straight through the rounding (`jax_mxfp4.fake_quantize`), as the experts of the
released models were post-trained. The packed model is then the trained one, not a rounding of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.models.gpt_oss import attention
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.models.gpt_oss.layers import (
    embed,
    linear,
    queries_keys_values,
    rms_norm,
    rope,
    rotations,
)
from jax_mxfp4.models.gpt_oss.params import MLP, Attention, Params, abstract_params
from jax_mxfp4.ops import prepare_on_cuda
from jax_mxfp4.quantize import ScaleRule, fake_quantize, quantize

# Of the initial matrices, as in GPT-2 and in transformers.
_INITIAL_DEVIATION = 0.02


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TrainableGptOss:
    """A GPT-OSS model in training, a pytree whose leaves are its parameters.

    What it computes with are the values of `packed()`, widened to `dtype`.

    Attributes:
      params: float32. Unlike those of `GptOss`, `gate_up` [E, 2I, D] and `down` [E, D, I] of the
        experts are dense.
      config: hyperparameters.
      dtype: of hidden states, float32, bfloat16 or float16.
      scale_rule: of the experts' blocks.
    """

    params: Params
    config: GptOssConfig = field(metadata={"static": True})
    dtype: DTypeLike = field(default=jnp.bfloat16, metadata={"static": True})
    scale_rule: ScaleRule = field(default="even", metadata={"static": True})

    @classmethod
    def init(
        cls,
        config: GptOssConfig,
        key: jax.Array,
        dtype: DTypeLike = jnp.bfloat16,
        scale_rule: ScaleRule = "even",
    ) -> "TrainableGptOss":
        """Draw parameters: normal matrices, smaller ones where they add to the residual stream."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(
            abstract_params(config), is_leaf=_is_packed
        )

        def draw(name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
            if name.endswith("norm"):
                return jnp.ones(shape)
            if name.endswith(("bias", "sinks")):
                return jnp.zeros(shape)
            adds = name.endswith(("out.weight", "down"))
            deviation = _INITIAL_DEVIATION / math.sqrt(2 * config.num_layers if adds else 1)
            return jax.random.normal(key, shape) * np.float32(deviation)

        drawn = [
            draw(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, each)
            for (path, leaf), each in zip(leaves, jax.random.split(key, len(leaves)), strict=True)
        ]
        return cls(jax.tree.unflatten(structure, drawn), config, dtype, scale_rule)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits that follow each token: int32 [B, T] -> float32 [B, T, V]."""
        return self.forward(tokens)[0]

    def forward(
        self, tokens: jax.Array, drop: Callable[[jax.Array], jax.Array] = lambda x: x
    ) -> tuple[jax.Array, jax.Array]:
        """Return logits, and what to add to the loss for tokens to be spread over the experts.

        Args:
          tokens: int32 [B, T].
          drop: dropout, called on the embedding and on what each block adds, [B, T, D], which is
            one and two times the number of layers.

        Returns:
          The logits, float32 [B, T, V]; the mean over the layers of the balance loss of Switch
          Transformers (arXiv:2101.03961, equation 4, without its factor), which is 1 where tokens
          are spread evenly, float32 scalar.
        """
        config = self.config
        params = jax.tree.map(
            lambda leaf: leaf.astype(self.dtype),
            _store(self.params, partial(fake_quantize, scale_rule=self.scale_rule)),
        )
        rotation = rotations(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], config)
        x = drop(embed(tokens, params.embedding, self.dtype))
        balance = jnp.float32(0)
        for kind, layer in zip(config.layer_types, params.layers, strict=True):
            window = attention.window_of(kind, config.sliding_window)
            x = x + drop(_attention_block(layer.attention, x, rotation, window, config))
            routed, unevenness = _expert_block(layer.mlp, x, config)
            x = x + drop(routed)
            balance = balance + unevenness
        x = rms_norm(x, params.norm, config.rms_norm_eps)
        logits = _linear(x, jnp.asarray(params.unembedding), jnp.float32)
        return logits, balance / np.float32(config.num_layers)

    def packed(self) -> Params:
        """Return the parameters of the `GptOss` that this is: packed experts, the rest bfloat16.

        On CUDA the experts are prepared, as those of a model that is loaded.
        """
        stored = _store(self.params, partial(quantize, scale_rule=self.scale_rule))
        narrow = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, stored
        )
        return prepare_on_cuda(narrow, donate=True)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, MXFP4Array)


def _store(params: Params, pack: Callable[[Any], Any]) -> Params:
    """Apply `pack` to the experts' matrices, and round everything else to what bfloat16 holds."""
    narrow = jax.tree.map(_round, params)
    layers = (
        replace(new, mlp=replace(new.mlp, gate_up=pack(old.mlp.gate_up), down=pack(old.mlp.down)))
        for new, old in zip(narrow.layers, params.layers, strict=True)
    )
    return replace(narrow, layers=tuple(layers))


@jax.custom_jvp
def _round(x: jax.Array) -> jax.Array:
    """Round to the values of bfloat16, with a straight-through gradient."""
    # Not a cast there and back, which XLA may leave out.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@_round.defjvp
def _round_jvp(primals, tangents):
    return _round(*primals), tangents[0]


def _linear(x: jax.Array, weight: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """`linear`, with gradients from products in x's dtype; JAX's own would be in float32."""
    return cast(jax.Array, _product(x, weight, out_dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, weight, out_dtype):
    return linear(x, weight, out_dtype=out_dtype)


def _product_forward(x, weight, out_dtype):
    return _product(x, weight, out_dtype), (x, weight)


def _product_backward(out_dtype, saved, gradient):
    del out_dtype
    x, weight = saved
    gradient = gradient.astype(x.dtype)
    rows, tokens = (array.reshape(-1, array.shape[-1]) for array in (gradient, x))
    return linear(gradient, weight.T), linear(rows.T, tokens.T)


_product.defvjp(_product_forward, _product_backward)


def _attention_block(
    params: Attention,
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    window: int | None,
    config: GptOssConfig,
) -> jax.Array:
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    q, k, v = queries_keys_values(normed, params.qkv, config)
    q, k = rope(q, rotation), rope(k, rotation)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    # cuDNN's attention has no gradient when it also returns the sums that sinks need.
    if window is None:
        part = attention.attend_causal(q, k, v, "reference")
    else:
        part = attention.attend_window(q, k, v, window, implementation="reference")
    attended = attention.merge([part], params.sinks, x.dtype)
    return linear(attended.reshape(*x.shape[:2], -1), params.out.weight, params.out.bias)


def _expert_block(params: MLP, x: jax.Array, config: GptOssConfig) -> tuple[jax.Array, jax.Array]:
    """Return what the experts add to x [B, T, D], and how unevenly they are used.

    Every expert sees every token, with a share of 0 where it was not chosen: three large products.
    While there are few experts that is faster than sorting the tokens, and it needs no gathers.
    """
    normed = rms_norm(x, params.norm, config.rms_norm_eps)
    logits = linear(normed, params.router.weight, params.router.bias, out_dtype=jnp.float32)
    _, ids = lax.top_k(logits, config.experts_per_token)
    chosen = jnp.any(ids[..., None] == jnp.arange(config.num_experts, dtype=ids.dtype), axis=-2)
    share = jax.nn.softmax(logits, axis=-1, where=chosen)

    # Gates and their linear partners alternate. The rows of all experts make one matrix each.
    gate, up = (
        _linear(
            normed, jnp.asarray(params.gate_up)[:, half::2].reshape(-1, config.hidden_size)
        ).reshape(*share.shape, config.intermediate_size)
        for half in (0, 1)
    )
    hidden = _activate(gate, up, params.gate_up_bias, share, config)
    down = jnp.swapaxes(jnp.asarray(params.down), 0, 1).reshape(config.hidden_size, -1)
    routed = _linear(hidden.reshape(*x.shape[:2], -1), down, jnp.float32)
    routed = routed + linear(share, params.down_bias.T.astype(jnp.float32))

    used = jnp.mean(chosen, axis=(0, 1), dtype=jnp.float32) / np.float32(config.experts_per_token)
    likely = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(0, 1))
    return routed.astype(x.dtype), np.float32(config.num_experts) * jnp.sum(used * likely)


@partial(jax.checkpoint, static_argnums=4)  # reverse mode would keep several arrays of this size
def _activate(
    gate: jax.Array, up: jax.Array, bias: jax.Array, share: jax.Array, config: GptOssConfig
) -> jax.Array:
    """Return hidden values times the experts' shares, computed in float32.

    Gate, up and the result are [B, T, E, I] of one dtype, bias is [E, 2I] and share float32
    [B, T, E].
    """
    limit, dtype = np.float32(config.swiglu_limit), gate.dtype
    bias = bias.astype(jnp.float32)
    gate = jnp.minimum(gate.astype(jnp.float32) + bias[:, 0::2], limit)
    up = jnp.clip(up.astype(jnp.float32) + bias[:, 1::2], -limit, limit)
    hidden = gate * jax.nn.sigmoid(np.float32(config.swiglu_alpha) * gate) * (up + np.float32(1))
    return (hidden * share[..., None]).astype(dtype)

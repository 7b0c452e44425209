"""GPT-OSS with dense experts: the judge of formats, and a second opinion on the packed model.

Attention and experts are the textbook ones: all scores at once, every expert on every token with
a weight of zero where it was not chosen. They share no code with the model's own and with
`jax_mxfp4.moe`, and the experts' weights can be any dense arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import Reader, TensorInfo, open_checkpoint, read_parameters
from jax_mxfp4.models.gpt_oss import GptOss, GptOssConfig, Params, read_config
from jax_mxfp4.models.gpt_oss.layers import (
    embed,
    linear,
    queries_keys_values,
    rope_frequencies,
)
from jax_mxfp4.models.gpt_oss.params import MLP, Attention, parameter_specs, params_of
from jax_mxfp4.reference import dequantize

# Hugging Face's names of experts that are not quantized; stored as [E, in, out].
_DENSE_EXPERTS = {
    f"layers.{{layer}}.mlp.{ours}": f"model.layers.{{layer}}.mlp.experts.{theirs}"
    for ours, theirs in (("gate_up", "gate_up_proj"), ("down", "down_proj"))
}
# What a layer captures, as it is computed; `jax.jit` returns dictionaries sorted.
_CAPTURED = (
    *("attn_out", "router_logits", "router_indices", "router_weights"),
    *("mlp_out", "hidden"),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class DenseGptOss:
    """A GPT-OSS model without packed weights, a `LanguageModel`.

    Attributes:
      params: as of `GptOss`, but `gate_up` [E, 2I, D] and `down` [E, D, I] are dense.
      config: hyperparameters.
    """

    params: Params
    config: GptOssConfig = field(metadata={"static": True})

    @classmethod
    def from_packed(cls, model: GptOss) -> "DenseGptOss":
        """Decode the experts of `model`, exactly, into the dtype it computes in."""
        params = jax.tree.map(
            lambda leaf: dequantize(leaf, model.dtype) if _is_packed(leaf) else leaf,
            model.params,
            is_leaf=_is_packed,
        )
        return cls(params, model.config)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: DTypeLike = jnp.float32) -> "DenseGptOss":
        """Load a GPT-OSS checkpoint, with packed experts or with dense ones.

        Args:
          path: as for `GptOss.from_pretrained`; or a folder in Hugging Face's layout whose experts
            are not quantized.
          dtype: float32, bfloat16 or float16.

        Raises:
          CheckpointError: as `GptOss.from_pretrained`.
        """
        if has_dense_experts(path):
            return cls(_load_dense(path, read_config(path), dtype), read_config(path))
        return cls.from_packed(GptOss.from_pretrained(path, dtype, "reference"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits that follow each token: int32 [B, T] -> float32 [B, T, V]."""
        return _forward(self.params, tokens, None, config=self.config)[0]

    def forward(
        self, tokens: jax.Array, router_indices: Sequence[jax.Array] | None = None
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...]]:
        """Return logits and captures, as `GptOss.forward` does with `capture=True`."""
        return _forward(self.params, tokens, router_indices, config=self.config)


def capture(
    model: GptOss | DenseGptOss,
    tokens: jax.Array,
    router_indices: Sequence[jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """Run a model and return what its layers compute, in the order of computation.

    Args:
      model: a GPT-OSS model.
      tokens: int32 [B, T].
      router_indices: for each layer the experts to use, int32 [B, T, k]; None: the model's choice.

    Returns:
      ``layers.0.attn_out``, ..., ``layers.0.hidden``, ``layers.1.attn_out``, ..., ``logits``.
    """
    if isinstance(model, DenseGptOss):
        logits, layers = model.forward(tokens, router_indices)
    else:
        logits, layers = model.forward(tokens, router_indices=router_indices, capture=True)
    named = {
        f"layers.{index}.{name}": layer[name]
        for index, layer in enumerate(layers)
        for name in _CAPTURED
    }
    return {**named, "logits": logits}


def has_dense_experts(path: str | Path) -> bool:
    """Whether the checkpoint `path` stores its experts unquantized, as Hugging Face does.

    Raises:
      CheckpointError: `path` is no checkpoint.
    """
    return (
        _DENSE_EXPERTS["layers.{layer}.mlp.down"].format(layer=0)
        in open_checkpoint(path, strict=False).tensors
    )


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, MXFP4Array)


def _load_dense(path: str | Path, config: GptOssConfig, dtype: DTypeLike) -> Params:
    reader = open_checkpoint(path, strict=False)
    experts = {
        ours.format(layer=layer): theirs.format(layer=layer)
        for layer in range(config.num_layers)
        for ours, theirs in _DENSE_EXPERTS.items()
    }
    rest = {name: spec for name, spec in parameter_specs(config).items() if name not in experts}
    loaded = dict(read_parameters(_Without(reader, set(experts.values())), rest))
    for ours, theirs in experts.items():
        loaded[ours] = np.swapaxes(reader.read(theirs), 1, 2)
    specs = parameter_specs(config)

    def read(name: str) -> jax.Array:
        array = loaded[name]
        if array.shape != specs[name].shape:
            raise ValueError(
                f"{path}: {name}: expected {list(specs[name].shape)}, found {list(array.shape)}"
            )
        return jnp.asarray(array, dtype)

    return params_of(config, read)


@dataclass(frozen=True)
class _Without:
    """A reader that hides some tensors."""

    reader: Reader
    hidden: set[str]

    @property
    def path(self) -> Path:
        return self.reader.path

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {k: v for k, v in self.reader.tensors.items() if k not in self.hidden}

    @property
    def problems(self) -> Sequence[str]:
        return self.reader.problems

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.reader.read(name, rows)


@partial(jax.jit, static_argnames="config")
def _forward(
    params: Params,
    tokens: jax.Array,
    router_indices: Sequence[jax.Array] | None,
    *,
    config: GptOssConfig,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], ...]]:
    x = embed(tokens, params.embedding, params.norm.dtype)
    captures = []
    for index, layer in enumerate(params.layers):
        sliding = config.layer_types[index] == "sliding_attention"
        window = config.sliding_window if sliding else tokens.shape[1]
        attended = _attend(layer.attention, x, window, config)
        x = x + attended
        forced = None if router_indices is None else router_indices[index]
        routed, capture = _route(layer.mlp, x, forced, config)
        x = x + routed
        captures.append({"attn_out": attended, **capture, "hidden": x})
    x = _rms_norm(x, params.norm, config)
    return linear(x, params.unembedding, out_dtype=jnp.float32), tuple(captures)


def _attend(params: Attention, x: jax.Array, window: int, config: GptOssConfig) -> jax.Array:
    """Attend to the last `window` positions; the sinks take probability but add nothing."""
    batch, length, _ = x.shape
    normed = _rms_norm(x, params.norm, config)
    q, k, v = queries_keys_values(normed, params.qkv, config)
    q, k = _rotate(q, config), _rotate(k, config)
    k, v = (jnp.repeat(side, q.shape[2] // k.shape[2], axis=2) for side in (k, v))
    scores = _einsum("bthd,bshd->bhts", q, k) * np.float32(config.head_dim**-0.5)
    distance = np.arange(length)[:, None] - np.arange(length)
    scores = jnp.where((distance >= 0) & (distance < window), scores, np.float32(-np.inf))
    sinks = jnp.broadcast_to(
        params.sinks.astype(jnp.float32)[:, None, None], (*scores.shape[:-1], 1)
    )
    weights = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1))[..., :-1]
    out = _einsum("bhts,bshd->bthd", weights.astype(v.dtype), v).astype(x.dtype)
    return linear(out.reshape(batch, length, -1), params.out.weight, params.out.bias)


def _rms_norm(x: jax.Array, scale: jax.Array, config: GptOssConfig) -> jax.Array:
    """Return x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    root = jnp.sqrt(mean + np.float32(config.rms_norm_eps))
    return (wide / root * scale.astype(jnp.float32)).astype(x.dtype)


def _rotate(x: jax.Array, config: GptOssConfig) -> jax.Array:
    """Multiply x [B, T, heads, head_dim] by e^(i angle), its halves being real and imaginary."""
    frequencies, scale = rope_frequencies(config)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    real, imaginary = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    unit = lax.complex(jnp.cos(angles), jnp.sin(angles))
    turned = lax.complex(real, imaginary) * unit * np.complex64(scale)
    return jnp.concatenate([turned.real, turned.imag], axis=-1).astype(x.dtype)


def _einsum(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Contract into float32; without the precision, float32 means TF32 on GPUs."""
    return jnp.einsum(
        subscripts, x, y, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _route(
    params: MLP, x: jax.Array, forced: jax.Array | None, config: GptOssConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    normed = _rms_norm(x, params.norm, config)
    logits = linear(normed, params.router.weight, params.router.bias, out_dtype=jnp.float32)
    indices = lax.top_k(logits, config.experts_per_token)[1] if forced is None else forced
    weights = jax.nn.softmax(jnp.take_along_axis(logits, indices, axis=-1), axis=-1)
    one_hot = jax.nn.one_hot(indices, config.num_experts, dtype=jnp.float32)
    share = jnp.sum(weights[..., None] * one_hot, axis=-2)
    routed = _experts(params, normed, share, config)
    return routed, {
        "router_logits": logits,
        "router_indices": indices,
        "router_weights": weights,
        "mlp_out": routed,
    }


def _experts(params: MLP, x: jax.Array, share: jax.Array, config: GptOssConfig) -> jax.Array:
    """Return sum_e share[..., e] * expert_e(x), summed in float32; share is float32 [B, T, E]."""

    def add(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        gate_up, gate_up_bias, down, down_bias, weight = expert
        gu = linear(x, gate_up, gate_up_bias, out_dtype=jnp.float32)
        limit = np.float32(config.swiglu_limit)
        gate, up = jnp.minimum(gu[..., 0::2], limit), jnp.clip(gu[..., 1::2], -limit, limit)
        hidden = gate * jax.nn.sigmoid(np.float32(config.swiglu_alpha) * gate) * (up + 1)
        y = linear(hidden.astype(x.dtype), down, down_bias, out_dtype=jnp.float32)
        return total + weight[..., None] * y, None

    weights: Any = (params.gate_up, params.gate_up_bias, params.down, params.down_bias)
    start = jnp.zeros(x.shape, jnp.float32)
    total, _ = lax.scan(add, start, (*weights, jnp.moveaxis(share, -1, 0)))
    return total.astype(x.dtype)

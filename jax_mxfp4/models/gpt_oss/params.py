"""The parameters of a GPT-OSS model as a pytree, and how a checkpoint fills it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import (
    GptOssParameters,
    ParameterSpec,
    Placement,
    Progress,
    open_checkpoint,
    place_parameters,
)
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.ops import prepare_on_cuda

# A dense matrix [N, K], or the same packed.
Weight = jax.Array | MXFP4Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Linear:
    """y = x @ weight.T + bias, with weight [N, K] and bias [N]."""

    weight: Weight
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Attention:
    """Parameters of one attention block.

    Attributes:
      norm: RMSNorm scale [D].
      qkv: D -> (heads + 2 x kv heads) x head_dim: the rows of q, then those of k, then those of v.
        Checkpoints have three parameters for it, `q`, `k` and `v`.
      out: heads x head_dim -> D.
      sinks: one more logit for each head [heads], which takes probability but has no value.
    """

    norm: jax.Array
    qkv: Linear
    out: Linear
    sinks: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MLP:
    """Parameters of one block of experts.

    Attributes:
      norm: RMSNorm scale [D].
      router: D -> E.
      gate_up: packed [E, 2I, D]; row 2i is a gate, row 2i + 1 its linear partner.
      gate_up_bias: [E, 2I].
      down: packed [E, D, I].
      down_bias: [E, D].
    """

    norm: jax.Array
    router: Linear
    gate_up: MXFP4Array
    gate_up_bias: jax.Array
    down: MXFP4Array
    down_bias: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Layer:
    """Parameters of one transformer block."""

    attention: Attention
    mlp: MLP


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Params:
    """All parameters of a GPT-OSS model.

    Attributes:
      embedding: [V, D], dense or packed.
      layers: one entry for each transformer block.
      norm: RMSNorm scale [D] after the last block.
      unembedding: [V, D], dense or packed.
    """

    embedding: Weight
    layers: tuple[Layer, ...]
    norm: jax.Array
    unembedding: Weight


def parameter_specs(config: GptOssConfig) -> dict[str, ParameterSpec]:
    """Return canonical name -> shape of every parameter, as `jax_mxfp4.checkpoints` wants it."""
    specs: dict[str, ParameterSpec] = {}

    def record(name: str, shape: tuple[int, ...], packed: bool) -> Any:
        specs[name] = ParameterSpec(shape, packed)

    _build(config, record, lambda parts: None)
    return specs


def abstract_params(config: GptOssConfig, dtype: DTypeLike = jnp.bfloat16) -> Params:
    """Return `Params` of `jax.ShapeDtypeStruct`, to trace and lower without weights.

    Packed weights have the layout of those that `load_params` puts on JAX's default device.
    """

    def describe(name: str, shape: tuple[int, ...], packed: bool) -> Any:
        del name
        if packed:
            return prepare_on_cuda(MXFP4Array.shape_dtype(shape))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    return _build(config, describe, lambda parts: jax.eval_shape(jnp.concatenate, parts))


def params_of(config: GptOssConfig, read: Callable[[str], Any]) -> Params:
    """Return `Params` of the arrays that read(canonical name) returns.

    `read` is called in the order of `parameter_specs`. No more than a layer's q, k and v exist
    twice on the way, apart and joined.
    """
    return _build(config, lambda name, shape, packed: read(name), _join)


def layer_of(config: GptOssConfig, index: int, read: Callable[[str], Any]) -> Layer:
    """Return the `Layer` of the arrays that read(canonical name) returns; see `params_of`."""
    return _build_layer(config, index, lambda name, shape, packed: read(name), _join)


def named_parameters(params: Params, config: GptOssConfig) -> dict[str, Any]:
    """Return the leaves of `params`, dense or packed, by canonical name; q, k and v apart."""
    named: dict[str, Any] = {}
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, MXFP4Array)
    )
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        block, joined, kind = name.rpartition(".qkv.")
        if not joined:
            named[name] = leaf
            continue
        first = 0
        for part, rows in zip("qkv", _qkv_rows(config), strict=True):
            named[f"{block}.{part}.{kind}"] = leaf[first : first + rows]
            first += rows
    return named


def load_params(
    path: str | Path,
    config: GptOssConfig,
    dtype: DTypeLike,
    progress: Progress | None = None,
    sharding: Placement = None,
) -> Params:
    """Read the parameters of the checkpoint `path`, a folder or a GGUF file.

    Packed experts go to their device as they are stored, and on CUDA they are then prepared
    (`jax_mxfp4.prepare`); everything else is converted to `dtype`.
    What the host's memory holds meanwhile is said at `place_parameters`. `sharding` is asked for q,
    k and v; joined, they are sharded as q is.

    Raises:
      CheckpointError: see `open_checkpoint` and `GptOssParameters`.
      TypeError, ValueError: `sharding` does not fit; see `place_parameters`.
    """
    parameters = GptOssParameters(open_checkpoint(path, strict=False), parameter_specs(config))
    prepare = partial(prepare_on_cuda, donate=True)
    placed = place_parameters(parameters, dtype, sharding, progress, prepare)

    def read(name: str) -> Any:
        found, array = next(placed)
        assert found == name  # both are in the order of the specs
        return array

    params = params_of(config, read)
    assert next(placed, None) is None  # and what comes after the last one is done
    return params


def _join(parts: Sequence[jax.Array]) -> jax.Array:
    """Return rows one after the other, sharded as the first part."""
    joined = jnp.concatenate(parts)
    target = parts[0].sharding
    return jax.device_put(joined, target) if len(target.device_set) > 1 else joined


def _qkv_rows(config: GptOssConfig) -> tuple[int, int, int]:
    keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, keys, keys


_Make = Callable[[str, tuple[int, ...], bool], Any]
_Join = Callable[[Sequence[Any]], Any]


def _build(config: GptOssConfig, make: _Make, join: _Join) -> Params:
    """Build the tree from make(canonical name, shape, packed); the one place that knows both.

    What checkpoints have as several parameters is join([made, ...]).
    """

    def dense(name: str, *shape: int) -> Any:
        return make(name, shape, False)

    return Params(
        embedding=dense("embedding", config.vocab_size, config.hidden_size),
        layers=tuple(_build_layer(config, i, make, join) for i in range(config.num_layers)),
        norm=dense("norm", config.hidden_size),
        unembedding=dense("unembedding", config.vocab_size, config.hidden_size),
    )


def _build_layer(config: GptOssConfig, index: int, make: _Make, join: _Join) -> Layer:
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    q_rows, k_rows, v_rows = _qkv_rows(config)
    name = f"layers.{index}"

    def dense(name: str, *shape: int) -> Any:
        return make(name, shape, False)

    def linear(name: str, rows: int, columns: int) -> Linear:
        return Linear(dense(f"{name}.weight", rows, columns), dense(f"{name}.bias", rows))

    def joined(*parts: Linear) -> Linear:
        return Linear(join([part.weight for part in parts]), join([part.bias for part in parts]))

    return Layer(
        Attention(
            norm=dense(f"{name}.attention.norm", hidden),
            qkv=joined(
                linear(f"{name}.attention.q", q_rows, hidden),
                linear(f"{name}.attention.k", k_rows, hidden),
                linear(f"{name}.attention.v", v_rows, hidden),
            ),
            out=linear(f"{name}.attention.out", hidden, q_rows),
            sinks=dense(f"{name}.attention.sinks", config.num_attention_heads),
        ),
        MLP(
            norm=dense(f"{name}.mlp.norm", hidden),
            router=linear(f"{name}.mlp.router", experts, hidden),
            gate_up=make(f"{name}.mlp.gate_up", (experts, 2 * inner, hidden), True),
            gate_up_bias=dense(f"{name}.mlp.gate_up_bias", experts, 2 * inner),
            down=make(f"{name}.mlp.down", (experts, hidden, inner), True),
            down_bias=dense(f"{name}.mlp.down_bias", experts, hidden),
        ),
    )

"""The parameters of a GPT-OSS model as a pytree, and how a checkpoint fills it."""

from collections.abc import Callable
from dataclasses import dataclass
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
      q: D -> heads x head_dim.
      k: D -> kv heads x head_dim.
      v: D -> kv heads x head_dim.
      out: heads x head_dim -> D.
      sinks: one more logit for each head [heads], which takes probability but has no value.
    """

    norm: jax.Array
    q: Linear
    k: Linear
    v: Linear
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

    _build(config, record)
    return specs


def abstract_params(config: GptOssConfig, dtype: DTypeLike = jnp.bfloat16) -> Params:
    """Return `Params` of `jax.ShapeDtypeStruct`, to trace and lower without weights."""

    def describe(name: str, shape: tuple[int, ...], packed: bool) -> Any:
        del name
        if packed:
            return MXFP4Array.shape_dtype(shape)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    return _build(config, describe)


def load_params(
    path: str | Path,
    config: GptOssConfig,
    dtype: DTypeLike,
    progress: Progress | None = None,
    sharding: Placement = None,
) -> Params:
    """Read the parameters of the checkpoint `path`, a folder or a GGUF file.

    Packed experts go to their device as they are stored; everything else is converted to `dtype`.
    What the host's memory holds meanwhile is said at `place_parameters`.

    Raises:
      CheckpointError: see `open_checkpoint` and `GptOssParameters`.
      TypeError, ValueError: `sharding` does not fit; see `place_parameters`.
    """
    parameters = GptOssParameters(open_checkpoint(path), parameter_specs(config))
    loaded = dict(place_parameters(parameters, dtype, sharding, progress))
    return _build(config, lambda name, shape, packed: loaded[name])


def _build(config: GptOssConfig, make: Callable[[str, tuple[int, ...], bool], Any]) -> Params:
    """Build the tree from make(canonical name, shape, packed); the one place that knows both."""
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim

    def dense(name: str, *shape: int) -> Any:
        return make(name, shape, False)

    def packed(name: str, *shape: int) -> Any:
        return make(name, shape, True)

    def linear(name: str, rows: int, columns: int) -> Linear:
        return Linear(dense(f"{name}.weight", rows, columns), dense(f"{name}.bias", rows))

    def layer(name: str) -> Layer:
        return Layer(
            Attention(
                norm=dense(f"{name}.attention.norm", hidden),
                q=linear(f"{name}.attention.q", heads, hidden),
                k=linear(f"{name}.attention.k", kv_heads, hidden),
                v=linear(f"{name}.attention.v", kv_heads, hidden),
                out=linear(f"{name}.attention.out", hidden, heads),
                sinks=dense(f"{name}.attention.sinks", config.num_attention_heads),
            ),
            MLP(
                norm=dense(f"{name}.mlp.norm", hidden),
                router=linear(f"{name}.mlp.router", experts, hidden),
                gate_up=packed(f"{name}.mlp.gate_up", experts, 2 * inner, hidden),
                gate_up_bias=dense(f"{name}.mlp.gate_up_bias", experts, 2 * inner),
                down=packed(f"{name}.mlp.down", experts, hidden, inner),
                down_bias=dense(f"{name}.mlp.down_bias", experts, hidden),
            ),
        )

    return Params(
        embedding=dense("embedding", config.vocab_size, hidden),
        layers=tuple(layer(f"layers.{i}") for i in range(config.num_layers)),
        norm=dense("norm", hidden),
        unembedding=dense("unembedding", config.vocab_size, hidden),
    )

"""The sizes of the released GPT-OSS models, and parameters of such sizes without a checkpoint."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_mxfp4.block_layouts import canonical
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.models.gpt_oss.params import Params, abstract_params
from jax_mxfp4.ops import prepare_on_cuda

ReleasedModel = Literal["20b", "120b"]

_LAYERS_AND_EXPERTS: dict[str, tuple[int, int]] = {"20b": (24, 32), "120b": (36, 128)}
# The middle one of three scale bytes, 2^-6: 2880 random products of unit activations then add up to
# about 2.4, and the activations of a random model stay as small as those of a trained one.
_SCALES = (120, 122)
_DENSE_STD = 0.02  # `initializer_range` of the released configurations


def released_config(model: ReleasedModel) -> GptOssConfig:
    """Return the configuration of openai/gpt-oss-20b or -120b.

    Raises:
      ValueError: another name.
    """
    if model not in _LAYERS_AND_EXPERTS:
        raise ValueError(f"model: expected {' or '.join(_LAYERS_AND_EXPERTS)}, found {model!r}")
    layers, experts = _LAYERS_AND_EXPERTS[model]
    return GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=experts,
        experts_per_token=4,
        layer_types=("sliding_attention", "full_attention") * (layers // 2),
        sliding_window=128,
        eos_token_ids=(200002, 199999, 200012),
    )


def random_params(config: GptOssConfig, dtype: DTypeLike = jnp.bfloat16, seed: int = 0) -> Params:
    """Make parameters on the default device, one array at a time, the largest ones first.

    Packed weights have random codes and scales from 2^-7 to 2^-5, other matrices, biases and sinks
    are normal with standard deviation 0.02, norms are 1. On CUDA packed weights are prepared
    (`jax_mxfp4.prepare`), one after the other.

    Args:
      config: the model's hyperparameters.
      dtype: of everything that is not packed.
      seed: of the random numbers. The generator is the device's own (XLA's RngBitGenerator), so
        that other kinds of devices give other numbers.
    """
    described, tree = jax.tree_util.tree_flatten_with_path(
        canonical(abstract_params(config, dtype))
    )
    # While the last and smallest arrays are made, hardly any memory beyond their own is needed.
    order = sorted(range(len(described)), key=lambda i: -_nbytes(described[i][1]))
    leaves: list[Any] = [None] * len(described)
    for index in order:
        path, leaf = described[index]
        # Waiting keeps the memory of later arrays' computations from being taken too early.
        leaves[index] = jax.block_until_ready(
            _random_leaf(np.uint32(seed), np.uint32(index), _kind(path), leaf.shape, leaf.dtype)
        )
    return prepare_on_cuda(jax.tree.unflatten(tree, leaves), donate=True)


def _nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.size * leaf.dtype.itemsize


def _kind(path: tuple[Any, ...]) -> str:
    """Return what an array is from the name of its field, in `Params` or in `MXFP4Array`."""
    name = path[-1].name
    return name if name in ("blocks", "scales", "norm") else "dense"


@partial(jax.jit, static_argnums=(2, 3, 4))
def _random_leaf(
    seed: jax.Array, index: jax.Array, kind: str, shape: tuple[int, ...], dtype: np.dtype
) -> jax.Array:
    if kind == "norm":
        return jnp.ones(shape, dtype)
    key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), index)
    if kind == "dense":
        return jax.random.normal(key, shape, dtype) * jnp.asarray(_DENSE_STD, dtype)
    if kind == "scales":
        low, high = _SCALES
        return np.uint8(low) + jax.random.bits(key, shape, jnp.uint8) % np.uint8(high - low + 1)
    return jax.random.bits(key, shape, jnp.uint8)

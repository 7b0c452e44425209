"""Packing the matrices that released models keep in bfloat16."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import jax
from jax import lax

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.format import BLOCK_SIZE
from jax_mxfp4.models.gpt_oss.params import Attention, Layer, Linear, Params, Weight
from jax_mxfp4.ops import prepare_on_cuda
from jax_mxfp4.quantize import quantize

DensePart = Literal["attention", "embedding", "unembedding"]

_ROWS = 4096  # quantized together, so that a vocabulary's float32 copy never exists at once


def check_parts(parts: Collection[DensePart]) -> None:
    """Raise ValueError where `parts` names something else than the parts that can be packed."""
    known = get_args(DensePart)
    unknown = sorted(set(parts) - set(known))
    if isinstance(parts, str) or unknown:
        raise ValueError(f"pack: expected a collection of {', '.join(known)}, found {parts!r}")


def pack_dense(params: Params, parts: Collection[DensePart]) -> Params:
    """Round dense matrices to MXFP4, each scale the best of three by mean squared error.

    On CUDA they are prepared (`jax_mxfp4.prepare`).

    Matrices that are packed already stay as they are, and so do routers and biases.

    Args:
      params: the parameters; other parameters of the result are the same arrays.
      parts: "attention" (qkv and out of all layers), "embedding", "unembedding".

    Raises:
      ValueError: another part, or a matrix whose rows are no multiple of 32.
    """
    check_parts(parts)
    if "attention" in parts:
        layers = (Layer(_pack_attention(layer.attention), layer.mlp) for layer in params.layers)
        params = replace(params, layers=tuple(layers))
    if "embedding" in parts:
        params = replace(params, embedding=_pack("embedding", params.embedding))
    if "unembedding" in parts:
        params = replace(params, unembedding=_pack("unembedding", params.unembedding))
    return params


def _pack_attention(attention: Attention) -> Attention:
    def packed(name: str) -> Linear:
        linear: Linear = getattr(attention, name)
        return Linear(_pack(f"attention.{name}", linear.weight), linear.bias)

    return replace(attention, **{name: packed(name) for name in ("qkv", "out")})


def _pack(name: str, weight: Weight) -> MXFP4Array:
    if isinstance(weight, MXFP4Array):
        return weight
    if weight.shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"pack: expected rows of a multiple of {BLOCK_SIZE} elements, {name} has "
            f"{weight.shape[-1]}"
        )
    return prepare_on_cuda(_quantize_rows(weight), donate=True)


@jax.jit
def _quantize_rows(weight: jax.Array) -> MXFP4Array:
    rows = min(_ROWS, weight.shape[0])
    return lax.map(partial(quantize, scale_rule="mse"), weight, batch_size=rows)

"""The NNX variable type of packed weights, and how the layers fill and read it."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_mxfp4.array import BLOCK_SIZE, MXFP4Array
from jax_mxfp4.ops import prepare_on_cuda
from jax_mxfp4.quantize import ScaleRule, quantize

FLOAT_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
NO_METADATA: Mapping[str, Any] = MappingProxyType({})

# The shape of a prepared block: words, and the bytes of a word.
_WORDS = (4, 4)

# NNX sets these itself for every Variable that is built.
_OWN_METADATA = ("hijax", "ref", "eager_sharding")


@nnx.register_variable_name("mxfp4")
class MXFP4Weight(nnx.Variable[jax.Array]):
    """Packed MXFP4 codes or scales: uint8, so neither differentiable nor trainable.

    `nnx.grad` and `nnx.Optimizer` select `nnx.Param` and therefore leave these alone. A weight is
    two variables, blocks `[..., K/32, 16]` and scales `[..., K/32]`, because each is then an
    ordinary array to checkpoints, `nnx.vmap` and sharding metadata. Under `nnx.bridge.to_linen`
    the collection is called "mxfp4".

    Layers that are made on CUDA prepare their weights (`jax_mxfp4.prepare`). Blocks in the prepared
    layout have the shape `[..., K/32, 4, 4]`, words and their bytes: the shape of the array itself
    says what it holds, whatever model it is put into, and a checkpoint of one layout that is read
    as the other fails for its shape. `with_layout` converts the variables of a model.
    """


def pack(
    kernel: Any,
    metadata: Mapping[str, Any],
    scale_rule: ScaleRule,
    *,
    shape: tuple[int, ...],
    transpose: bool,
) -> tuple[MXFP4Weight, MXFP4Weight]:
    """Makes the `(blocks, scales)` variables of a weight.

    Args:
      kernel: what an initializer returned: a float array, the same with metadata
        (`nnx.with_partitioning`), its `jax.ShapeDtypeStruct`, or an `MXFP4Array` of any layout.
        On CUDA the weight is prepared; elsewhere an `MXFP4Array` is stored as it is.
      metadata: of the kernel. `out_sharding` names the axes of the unpacked kernel and is
        rewritten for the packed arrays: the entry of the packed axis moves to the blocks of 32
        along it, and the 16 bytes of a block stay together.
      scale_rule: see `jax_mxfp4.quantize`.
      shape: the last axes that the packed weight must have.
      transpose: whether the kernel is [..., in, out], which must become [..., out, in] for blocks
        to run along `in`. An `MXFP4Array` is [..., out, in] already.

    Raises:
      ValueError: the weight has another shape, or `out_sharding` does not fit it.
    """
    if isinstance(kernel, nnx.VariableMetadata):
        metadata = {**kernel.metadata, **metadata}
        kernel = kernel.raw_value

    def convert(kernel: jax.Array) -> MXFP4Array:
        return quantize(jnp.swapaxes(kernel, -1, -2) if transpose else kernel, scale_rule)

    if isinstance(kernel, MXFP4Array):
        packed = prepare_on_cuda(kernel)  # a copy: the given array is its owner's
    elif isinstance(kernel, jax.ShapeDtypeStruct):
        packed = prepare_on_cuda(jax.eval_shape(convert, kernel))
    else:
        packed = prepare_on_cuda(convert(kernel), donate=True)
    if packed.shape[-len(shape) :] != shape:
        raise ValueError(f"the packed weight must end in shape {shape}, got {packed.shape}")

    blocks, scales = to_leaves(packed)
    rest = dict(metadata)
    sharding = rest.pop("out_sharding", None)
    blocks_metadata, scales_metadata = {}, {}
    if sharding is not None:
        scales_axes = _axes(sharding, packed.ndim)
        if transpose:
            scales_axes = (*scales_axes[:-2], scales_axes[-1], scales_axes[-2])
        scales_metadata["out_sharding"] = _like(sharding, scales_axes)
        blocks_metadata["out_sharding"] = sharding_of_blocks(
            _like(sharding, scales_axes), blocks, scales
        )
    return (
        MXFP4Weight(blocks, **rest, **blocks_metadata),
        MXFP4Weight(scales, **rest, **scales_metadata),
    )


def sharding_of_blocks(sharding: Any, blocks: Any, scales: Any) -> Any:
    """Returns the `out_sharding` of blocks from that of scales, or of blocks in another layout."""
    leading = len(scales.shape)
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    axes = _axes(tuple(spec)[:leading], leading)
    return _like(sharding, (*axes, *(None,) * (len(blocks.shape) - leading)))


def _axes(sharding: Any, ndim: int) -> tuple[Any, ...]:
    """Returns the mesh axis of each of `ndim` array axes."""
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    if not isinstance(spec, tuple | PartitionSpec) or len(spec) > ndim:
        raise ValueError(
            f"out_sharding must be a tuple, PartitionSpec or NamedSharding of at most {ndim} "
            f"axes, got {sharding!r}"
        )
    return (*spec, *[None] * (ndim - len(spec)))


def _like(sharding: Any, axes: tuple[Any, ...]) -> Any:
    """Returns `axes` in the kind of `sharding`."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))
    return PartitionSpec(*axes) if isinstance(sharding, PartitionSpec) else axes


def metadata_of(kernel: nnx.Variable[Any]) -> dict[str, Any]:
    """Returns the metadata of an existing kernel, for `pack`.

    The packed arrays are computed from the kernel and follow its placement, so no mesh has to be
    active, as it must be where a constructor places new weights.
    """
    metadata = {k: v for k, v in kernel.get_metadata().items() if k not in _OWN_METADATA}
    return {**metadata, "eager_sharding": False} if "out_sharding" in metadata else metadata


def unpack(blocks: nnx.Variable[jax.Array], scales: nnx.Variable[jax.Array]) -> MXFP4Array:
    """Returns the weight as the operations take it; abstract variables give an abstract one."""
    return from_leaves(blocks.get_value(), scales.get_value())


def to_leaves(weight: MXFP4Array) -> tuple[Any, Any]:
    """Returns blocks and scales as variables hold them; see `MXFP4Weight`."""
    if weight.layout == "canonical":
        return weight.blocks, weight.scales
    return _reshaped(weight.blocks, (*weight.scales.shape, *_WORDS)), weight.scales


def from_leaves(blocks: Any, scales: Any) -> MXFP4Array:
    """Returns the weight that variables hold; the inverse of `to_leaves`."""
    shape = tuple(scales.shape)
    if tuple(blocks.shape) != (*shape, *_WORDS):
        return MXFP4Array(blocks, scales)
    return MXFP4Array(_reshaped(blocks, (*shape, math.prod(_WORDS))), scales, "prepared")


def _reshaped(array: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, array.dtype)
    return array.reshape(shape)


def compute_dtype(dtype: DTypeLike | None, *arrays: jax.Array | None) -> np.dtype:
    """Returns the dtype of a layer's computation, by the rule of `nnx.Linear`.

    It is `dtype` if that is given, else the promotion of those arrays that are not None, with
    float32 for integers. Packed weights have no floating-point dtype and take no part.
    """
    if dtype is not None:
        return jnp.dtype(dtype)
    promoted = jnp.result_type(*(array for array in arrays if array is not None))
    return promoted if jnp.issubdtype(promoted, jnp.inexact) else jnp.dtype(jnp.float32)


def check_block_multiple(name: str, size: int) -> None:
    """Raises ValueError unless `size` is a positive multiple of the block size."""
    if size <= 0 or size % BLOCK_SIZE:
        raise ValueError(f"{name} must be a positive multiple of {BLOCK_SIZE}, got {size}")


def check_float_dtype(name: str, dtype: DTypeLike | None) -> None:
    """Raises TypeError unless `dtype` is None or a dtype that the operations compute in."""
    if dtype is not None and jnp.dtype(dtype) not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {jnp.dtype(dtype)}")

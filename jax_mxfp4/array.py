"""`MXFP4Array`: packed MXFP4 data as a pytree."""

import math
from dataclasses import dataclass
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE, BlockLayout


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False, repr=False)
class MXFP4Array:
    """An array of logical shape [..., K] packed along its last axis in blocks of 32.

    The following hold of a canonical array (G = K / 32, q = one element's code):

    * blocks.shape == (..., G, 16), scales.shape == (..., G), both uint8
    * q[..., 32 * g + 2 * j]     == blocks[..., g, j] & 15
    * q[..., 32 * g + 2 * j + 1] == blocks[..., g, j] >> 4
    * original[..., k] ≈ E2M1_VALUES[q[..., k]] * 2 ** (scales[..., k // 32] - 127)
    * scales == 255 makes its block NaN

    This is the layout of the ``*_blocks`` and ``*_scales`` tensors of the GPT-OSS checkpoints. In a
    prepared array the 16 bytes of each block are arranged as the CUDA kernels want them, by the
    table in `jax_mxfp4.format`; everything else is the same. `jax_mxfp4.prepare` and
    `jax_mxfp4.canonical` turn one into the other, and every operation takes both.

    The array is a pytree with the leaves ``blocks`` and ``scales``; the leaves may be JAX or NumPy
    arrays, tracers or `jax.ShapeDtypeStruct`. Transformations rebuild it with whatever leaves they
    need, unchecked. The layout is part of the tree's structure. The path of a prepared array's
    codes ends in ``prepared_blocks``, so that what stores leaves by their paths never takes one
    layout for the other.

    Attributes:
      blocks: packed element codes, uint8 [..., K / 32, 16].
      scales: E8M0 scale bytes, uint8 [..., K / 32].
      layout: "canonical" or "prepared", of the bytes in `blocks`.

    Raises:
      TypeError: a leaf has no shape and dtype, or its dtype is not uint8.
      ValueError: the two shapes do not belong together, or `layout` is unknown.
    """

    blocks: Any
    scales: Any
    layout: BlockLayout = "canonical"

    def __post_init__(self) -> None:
        """Check that the leaves are uint8 and belong together, and the layout."""
        check_layout("layout", self.layout)
        for name in ("blocks", "scales"):
            leaf = getattr(self, name)
            if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
                raise TypeError(f"{name} must be a uint8 array, got {type(leaf).__name__}")
            if leaf.dtype != np.uint8:
                raise TypeError(f"{name} must have dtype uint8, got {leaf.dtype}")
        blocks, scales = tuple(self.blocks.shape), tuple(self.scales.shape)
        if len(blocks) < 2 or blocks[-1] != BLOCK_BYTES:
            raise ValueError(f"blocks must have shape [..., K / 32, {BLOCK_BYTES}], got {blocks}")
        if scales != blocks[:-1]:
            raise ValueError(
                f"scales must have shape {blocks[:-1]} to match blocks {blocks}, got {scales}"
            )

    @staticmethod
    def shape_dtype(shape: tuple[int, ...], layout: BlockLayout = "canonical") -> "MXFP4Array":
        """Describe a packed array of logical `shape` [..., K] without allocating it.

        Returns:
          An `MXFP4Array` whose leaves are `jax.ShapeDtypeStruct`.

        Raises:
          ValueError: `shape` is empty, its last dimension is not a multiple of 32, or `layout` is
            unknown.
        """
        if not shape or shape[-1] % BLOCK_SIZE:
            raise ValueError(f"shape must end in a multiple of {BLOCK_SIZE}, got {tuple(shape)}")
        scales = (*shape[:-1], shape[-1] // BLOCK_SIZE)
        return MXFP4Array(
            jax.ShapeDtypeStruct((*scales, BLOCK_BYTES), jnp.uint8),
            jax.ShapeDtypeStruct(scales, jnp.uint8),
            layout,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., K]."""
        *leading, groups = self.scales.shape
        return (*leading, groups * BLOCK_SIZE)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.scales.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.num_blocks * BLOCK_SIZE

    @property
    def num_blocks(self) -> int:
        """Number of blocks, which is the number of scales."""
        return math.prod(self.scales.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of packed storage, codes and scales: 17 for each block."""
        return self.num_blocks * (BLOCK_BYTES + 1)

    def __getitem__(self, index: Any) -> "MXFP4Array":
        """Index the leading axes; the packed last axis always stays whole, and its layout.

        Raises:
          IndexError: the index reaches the packed axis, or an int is out of range.
        """
        index = self._leading_index(index if isinstance(index, tuple) else (index,))
        return MXFP4Array(self.blocks[index], self.scales[index], self.layout)

    def _leading_index(self, index: tuple[Any, ...]) -> tuple[Any, ...]:
        """Expand an Ellipsis to the leading axes and check that the last axis is not indexed."""
        # `in` and `count` would compare array indices elementwise.
        ellipses = [i for i, item in enumerate(index) if item is Ellipsis]
        if len(ellipses) > 1:
            raise IndexError("an index can have only one Ellipsis")
        leading = self.ndim - 1
        used = sum(_axes_consumed(item) for item in index)
        if used > leading:
            raise IndexError(
                f"only the {leading} leading axes of {self!r} can be indexed, got {used} indices"
            )
        if ellipses:
            at = ellipses[0]
            index = (*index[:at], *[slice(None)] * (leading - used), *index[at + 1 :])
        axis = 0
        for item in index:
            # JAX clamps static indices, but Python's iteration protocol relies on the error.
            is_int = isinstance(item, int | np.integer) and not isinstance(item, bool)
            if is_int and not -self.shape[axis] <= item < self.shape[axis]:
                raise IndexError(f"index {item} is out of range for axis {axis} of {self!r}")
            axis += _axes_consumed(item)
        return index

    def __repr__(self) -> str:
        """Show the logical shape and the kind of the leaves, not the data."""
        layout = "" if self.layout == "canonical" else f", layout={self.layout!r}"
        if not getattr(self.scales, "shape", ()):  # placeholders
            return f"MXFP4Array(blocks={self.blocks!r}, scales={self.scales!r}{layout})"
        return f"MXFP4Array(shape={self.shape}, leaves={type(self.blocks).__name__}{layout})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], tuple[Any, Any]], BlockLayout]:
        """Return the leaves with their names and the layout, as `jax.tree_util` asks."""
        key = jax.tree_util.GetAttrKey
        name = "blocks" if self.layout == "canonical" else "prepared_blocks"
        return ((key(name), self.blocks), (key("scales"), self.scales)), self.layout

    def tree_flatten(self) -> tuple[tuple[Any, Any], BlockLayout]:
        """Return the leaves and the layout, as `jax.tree_util` asks."""
        return (self.blocks, self.scales), self.layout

    @classmethod
    def tree_unflatten(cls, aux_data: BlockLayout, children: tuple[Any, Any]) -> "MXFP4Array":
        """Rebuild the array without checks: JAX passes placeholders of every kind."""
        array = object.__new__(cls)
        object.__setattr__(array, "blocks", children[0])
        object.__setattr__(array, "scales", children[1])
        object.__setattr__(array, "layout", aux_data)
        return array


def check_layout(name: str, layout: object) -> None:
    """Raise ValueError unless `layout` is that of an `MXFP4Array`."""
    if layout not in get_args(BlockLayout):
        expected = " or ".join(f'"{known}"' for known in get_args(BlockLayout))
        raise ValueError(f"{name} must be {expected}, got {layout!r}")


def _axes_consumed(item: Any) -> int:
    """Return how many axes one entry of an index tuple takes up."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if getattr(item, "dtype", None) == np.bool_:
        return item.ndim
    return 1


# Without this, `jax.export` cannot serialize programs that take or return an MXFP4Array. No bytes
# mean canonical, as in programs from before there was another layout.
jax_export.register_pytree_node_serialization(
    MXFP4Array,
    serialized_name="jax_mxfp4.MXFP4Array",
    serialize_auxdata=lambda layout: b"" if layout == "canonical" else layout.encode(),
    deserialize_auxdata=lambda data: bytes(data).decode() or "canonical",
)

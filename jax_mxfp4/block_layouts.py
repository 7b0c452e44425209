"""Packed arrays from one layout of their blocks to the other."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import Sharding

from jax_mxfp4 import format as mxfp4_format
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.format import BlockLayout

Tree = TypeVar("Tree")

_CONVERSIONS = {
    "prepared": mxfp4_format.prepare_blocks,
    "canonical": mxfp4_format.canonical_blocks,
}


def prepare(tree: Tree, *, donate: bool = False) -> Tree:
    """Bring packed arrays into the layout that the CUDA kernels of `matmul` and `moe` read.

    Every operation takes both layouts and gives the same bits. But a canonical weight costs those
    kernels a pass over it in every call, which this does once and for all. Elsewhere there is
    nothing to gain.

    Outside of a traced function arrays are converted one after the other. NumPy arrays stay NumPy
    arrays, `jax.ShapeDtypeStruct` are described anew, and sharded arrays keep their sharding: no
    block needs another one.

    Args:
      tree: an `MXFP4Array`, or any pytree that has some.
      donate: give up the codes of the given arrays, which must not be used any more; then hardly
        more memory than that of `tree` and of the largest array in it is ever needed. Of no
        importance inside traced functions.

    Returns:
      `tree` with every `MXFP4Array` in the prepared layout. One that was so already is the same
      object, and so is every other leaf. What was one array in several places still is.
    """
    return convert_arrays(tree, lambda w: "prepared", donate=donate)


def canonical(tree: Tree, *, donate: bool = False) -> Tree:
    """Bring packed arrays into the canonical layout, that of files; the inverse of `prepare`.

    Args:
      tree: an `MXFP4Array`, or any pytree that has some.
      donate: see `prepare`.

    Returns:
      `tree` with every `MXFP4Array` in the canonical layout; see `prepare`.
    """
    return convert_arrays(tree, lambda w: "canonical", donate=donate)


def convert_arrays(
    tree: Tree, layout_of: Callable[[MXFP4Array], BlockLayout], *, donate: bool
) -> Tree:
    """Bring every packed array w of `tree` into layout_of(w); the rest is that of `prepare`."""
    converted: dict[int, Any] = {}
    under_way: Any = None

    def convert(leaf: Any) -> Any:
        nonlocal under_way
        if not isinstance(leaf, MXFP4Array):
            return leaf
        layout = layout_of(leaf)
        if leaf.layout == layout:
            return leaf
        if id(leaf.blocks) not in converted:
            # Else the memory of all conversions could be taken before the first of them is done.
            jax.block_until_ready(under_way)
            converted[id(leaf.blocks)] = under_way = _convert_blocks(leaf.blocks, layout, donate)
        return MXFP4Array(converted[id(leaf.blocks)], leaf.scales, layout)

    return jax.tree.map(convert, tree, is_leaf=lambda leaf: isinstance(leaf, MXFP4Array))


def _convert_blocks(blocks: Any, layout: BlockLayout, donate: bool) -> Any:
    if isinstance(blocks, jax.ShapeDtypeStruct):
        return blocks
    if not isinstance(blocks, jax.Array) or isinstance(blocks, Tracer):
        return _CONVERSIONS[layout](blocks)
    # A result without a sharding of its own follows its operand, committed to a device or not.
    several = len(blocks.sharding.device_set) > 1
    return _compiled(layout, donate, blocks.sharding if several else None)(blocks)


@functools.cache
def _compiled(
    layout: BlockLayout, donate: bool, sharding: Sharding | None
) -> Callable[[jax.Array], jax.Array]:
    donated = 0 if donate else ()
    return jax.jit(_CONVERSIONS[layout], donate_argnums=donated, out_shardings=sharding)

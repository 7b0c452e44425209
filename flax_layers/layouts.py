"""The layout of packed weights in the variables of Flax models."""

from typing import Any, TypeVar

import jax
from flax import nnx

from flax_layers.variables import from_leaves, sharding_of_blocks, to_leaves
from jax_mxfp4.array import BlockLayout, check_layout
from jax_mxfp4.block_layouts import canonical, prepare
from jax_mxfp4.ops import prepare_on_cuda

Variables = TypeVar("Variables")

_BLOCKS, _SCALES = "_blocks", "_scales"
_CONVERSIONS = {None: prepare_on_cuda, "canonical": canonical, "prepared": prepare}


def with_layout(variables: Variables, layout: BlockLayout | None = None) -> Variables:
    """Returns the variables of a model with all packed weights in one layout.

    Layers read both layouts. What depends on the layout is how a checkpoint of the variables looks:
    one that is to be read on any machine should be canonical, and what was read from it should be
    prepared before it is used on CUDA::

        state = with_layout(nnx.state(model), "canonical")     # to save
        nnx.update(model, with_layout(restored))               # to use

    Args:
      variables: an `nnx.State`, the variables of a Linen model, either as plain dictionaries, or an
        `nnx.Module`; arrays may be abstract. It is not changed.
      layout: "canonical", "prepared", or None for what new layers have: prepared on CUDA, else as
        it is.

    Raises:
      ValueError: `layout` is unknown, or the shapes of blocks and scales do not belong together.
    """
    if layout is not None:
        check_layout("layout", layout)
    if isinstance(variables, nnx.Module):
        graph, state = nnx.split(variables, graph=True)
        return nnx.merge(graph, with_layout(state, layout))

    leaves, tree = jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_variable)
    scales = {_names(path): leaf for path, leaf in leaves if _names(path)[-1].endswith(_SCALES)}
    converted = []
    for path, leaf in leaves:
        *parents, name = _names(path)
        partner = (*parents, name.removesuffix(_BLOCKS) + _SCALES)
        if name.endswith(_BLOCKS) and partner in scales:
            leaf = _converted(leaf, scales[partner], layout)
        converted.append(leaf)
    return jax.tree.unflatten(tree, converted)


def _converted(blocks: Any, scales: Any, layout: BlockLayout | None) -> Any:
    """Returns blocks, a variable or its value, in the layout."""
    weight = from_leaves(_value(blocks), _value(scales))
    converted = _CONVERSIONS[layout](weight)
    if converted is weight:
        return blocks
    value, _ = to_leaves(converted)
    if not _is_variable(blocks):
        return value
    metadata = {}
    if (sharding := blocks.get_metadata().get("out_sharding")) is not None:
        metadata["out_sharding"] = sharding_of_blocks(sharding, value, weight.scales)
    return blocks.replace(value, **metadata)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

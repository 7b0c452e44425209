"""Finding the modules of an NNX model under all of their names."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx


@dataclass
class Site:
    """A module that holds parameters.

    Attributes:
      module: the object.
      paths: every path that leads to it, as attribute names and indices joined by dots.
      parents: for each path, the modules on the way, outermost first.
    """

    module: nnx.Module
    paths: list[str] = field(default_factory=list)
    parents: list[tuple[nnx.Module, ...]] = field(default_factory=list)


def find_sites(model: nnx.Module, *, stop_at: tuple[type, ...]) -> list[Site]:
    """Returns the modules with an `nnx.Param` of their own, in the order of the attributes.

    Unlike `nnx.iter_modules`, this gives all paths of a module that is used in several places.

    Args:
      model: the root; its path is "".
      stop_at: module types that are passed over with all that they contain.
    """
    sites: dict[int, Site] = {}
    for path, parents, module in _occurrences(model, (), (), stop_at):
        if any(isinstance(child, nnx.Param) for _, child in children(module)):
            site = sites.setdefault(id(module), Site(module))
            site.paths.append(".".join(path))
            site.parents.append(parents)
    return list(sites.values())


def children(node: Any) -> list[tuple[str, Any]]:
    """Returns what a module or a container holds, with attribute names, keys or indices."""
    if isinstance(node, nnx.Variable):
        return []
    if isinstance(node, nnx.Pytree):
        return [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree__")]
    flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(jax.tree_util.keystr(key, simple=True), child) for key, child in flat if key]


def _occurrences(
    node: Any, path: tuple[str, ...], parents: tuple[nnx.Module, ...], stop_at: tuple[type, ...]
) -> Iterator[tuple[tuple[str, ...], tuple[nnx.Module, ...], nnx.Module]]:
    """Yields every module under every path; a path that returns to its own parent is cut there."""
    if isinstance(node, stop_at):
        return
    if isinstance(node, nnx.Module):
        if any(node is parent for parent in parents):
            return
        yield path, parents, node
        parents = (*parents, node)
    for name, child in children(node):
        yield from _occurrences(child, (*path, name), parents, stop_at)

"""What evaluation asks of a model: logits for tokens, and weight matrices that can be replaced."""

import re
from collections.abc import Collection, Mapping
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_mxfp4.array import MXFP4Array

# Of the arrays with two or more axes, those that no linear layer multiplies with.
_NOT_A_MATRIX = re.compile(r"bias|norm|sinks")
# Matrices that released 4-bit checkpoints leave in 16 bits.
_USUALLY_KEPT = re.compile(r"embed|router|lm_head")
# Flax's name for a weight [K, N].
_KERNEL = re.compile(r"(^|\.)kernel$")


class LanguageModel(Protocol):
    """A causal language model: a pytree that can be called, also below `jax.jit`.

    Its leaves are its parameters. Weights of linear layers are [..., N, K], dense or an
    `MXFP4Array`; but where a leaf is called `kernel`, as in Flax, it is [..., K, N].
    """

    def __call__(self, tokens: jax.Array, /) -> jax.Array:
        """Return the logits that follow each token: int32 [B, T] -> floating point [B, T, V]."""
        ...


Model = TypeVar("Model", bound=LanguageModel)


def weight_matrices(model: LanguageModel) -> dict[str, jax.Array | MXFP4Array]:
    """Return the model's weight matrices [..., N, K] by name, in the order of its leaves.

    A name is the path of the leaf, such as ``layers.0.attention.qkv.weight``. Biases, norms and
    attention sinks are no matrices, also where they are stacked to more than one axis.
    """
    return {
        name: leaf if isinstance(leaf, MXFP4Array) else _orient(name, leaf)
        for name, leaf in _named_leaves(model)
        if isinstance(leaf, MXFP4Array) or _is_matrix(name, leaf)
    }


def select_matrices(
    model: LanguageModel, pattern: str | None = None, leave: Collection[str] = ()
) -> dict[str, jax.Array]:
    """Return the dense weight matrices whose names `pattern` matches.

    Args:
      model: the model.
      pattern: a regular expression that is searched for in the names. None selects what 4-bit
        checkpoints usually quantize: all but embeddings, the output matrix and routers.
      leave: names that are not selected without a pattern.

    Returns:
      name -> dense matrix [..., N, K].

    Raises:
      ValueError: the pattern is no regular expression, matches no matrix, or matches a packed one.
    """
    matrices = weight_matrices(model)
    if pattern is None:
        chosen = [n for n in matrices if not _USUALLY_KEPT.search(n) and n not in leave]
    else:
        try:
            chosen = [name for name in matrices if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    if not chosen:
        raise ValueError(
            f"pattern {pattern!r} matches none of the {len(matrices)} matrices: "
            + ", ".join(list(matrices)[:6])
            + ", ..."
        )
    selected: dict[str, jax.Array] = {}
    for name in chosen:
        matrix = matrices[name]
        if isinstance(matrix, MXFP4Array):
            raise ValueError(f"{name} is packed: expected a model with dense weights")
        selected[name] = matrix
    return selected


def replace_weights(model: Model, new: Mapping[str, Any]) -> Model:
    """Return the model with some of its weight matrices replaced.

    Args:
      model: the model; it is not changed.
      new: name -> array [..., N, K] of the old one's shape, cast to its dtype.

    Raises:
      ValueError: a name or a shape does not fit.
    """
    matrices = weight_matrices(model)
    if unknown := sorted(new.keys() - matrices.keys()):
        raise ValueError(f"the model has no matrix {unknown[0]!r}")
    for name, array in new.items():
        if np.shape(array) != matrices[name].shape:
            raise ValueError(
                f"{name}: expected shape {list(matrices[name].shape)}, "
                f"found {list(np.shape(array))}"
            )
    leaves = [
        _orient(name, jnp.asarray(new[name], leaf.dtype)) if name in new else leaf
        for name, leaf in _named_leaves(model)
    ]
    return jax.tree.unflatten(jax.tree.structure(model, is_leaf=_is_packed), leaves)


def _named_leaves(model: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_packed)
    return [(_name(path), leaf) for path, leaf in leaves]


def _name(path: tuple[Any, ...]) -> str:
    """Join the keys by dots, without what wraps all parameters or each variable of a module."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removeprefix("params.").removesuffix(".value")


def _orient(name: str, matrix: jax.Array) -> jax.Array:
    """Turn the leaf called `name` to [..., N, K], or back."""
    return jnp.swapaxes(matrix, -2, -1) if _KERNEL.search(name) else matrix


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, MXFP4Array)


def _is_matrix(name: str, leaf: Any) -> bool:
    return (
        getattr(leaf, "ndim", 0) >= 2
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and not _NOT_A_MATRIX.search(name)
    )

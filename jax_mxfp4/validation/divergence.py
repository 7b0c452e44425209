"""Finding the first layer in which two implementations differ."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_mxfp4.validation.errors import TensorError, tensor_error

Layer = tuple[str, Callable[[Any], Any]]
"""A name and a function from the state before a layer to the state after it."""


@dataclass(frozen=True)
class LayerError:
    """How one layer's result differs.

    Attributes:
      name: of the layer or of the captured value.
      accumulated: of the result, earlier differences included.
      own: of the result from the same input; None where layers cannot be run by themselves.
      beyond: whether the relative RMS error (own where there is one) exceeds the tolerance.
    """

    name: str
    accumulated: TensorError
    own: TensorError | None
    beyond: bool


def compare_layers(
    expected: Sequence[Layer], actual: Sequence[Layer], state: Any, tolerance: float
) -> list[LayerError]:
    """Run two sequences of layers side by side.

    Every actual layer runs twice: on what the expected layers led to, which gives its own error,
    and on what the actual layers before it led to, which gives the accumulated one. So one wrong
    layer is told from many small errors.

    Args:
      expected: the layers to be compared with.
      actual: layers of the same names.
      state: what the first layer takes, an array or a pytree of arrays.
      tolerance: largest relative RMS error of a layer by itself.

    Raises:
      ValueError: the two sequences have different names.
    """
    names, others = [name for name, _ in expected], [name for name, _ in actual]
    if names != others:
        raise ValueError(f"actual: expected the layers {names}, found {others}")
    results = []
    own_state = state
    for (name, run), (_, run_actual) in zip(expected, actual, strict=True):
        own = run_actual(state)
        own_state = run_actual(own_state)
        state = run(state)
        own_error = _error(state, own)
        results.append(
            LayerError(name, _error(state, own_state), own_error, _beyond(own_error, tolerance))
        )
    return results


def compare_captures(
    expected: Mapping[str, Any], actual: Mapping[str, Any], tolerance: float
) -> list[LayerError]:
    """Compare intermediate results that two runs captured.

    Integers (which experts were chosen) are compared too, as numbers, but never count as beyond
    the tolerance: two experts with almost equal scores may swap, and the scores are compared.

    Args:
      expected: name -> array, in the order in which a model computes them.
      actual: arrays of the same names and shapes.
      tolerance: largest relative RMS error.

    Raises:
      ValueError: names or shapes differ.
    """
    if list(expected) != list(actual):
        raise ValueError(f"actual: expected {list(expected)}, found {list(actual)}")
    results = []
    for name, value in expected.items():
        error = tensor_error(value, actual[name])
        counts = not np.issubdtype(np.asarray(value).dtype, np.integer)
        results.append(LayerError(name, error, None, counts and _beyond(error, tolerance)))
    return results


def first_divergence(errors: Iterable[LayerError]) -> LayerError | None:
    """Return the first error beyond its tolerance, or None."""
    return next((error for error in errors if error.beyond), None)


def _error(expected: Any, actual: Any) -> TensorError:
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True)
    return sum((tensor_error(x, y) for x, y in pairs), TensorError())


def _beyond(error: TensorError, tolerance: float) -> bool:
    return not error.relative_rms <= tolerance  # also true for NaN

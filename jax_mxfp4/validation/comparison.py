"""Formats side by side: storage, weight error, and what a model makes of it at equal text."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from jax_mxfp4.validation.errors import TensorError, tensor_error
from jax_mxfp4.validation.formats import Format
from jax_mxfp4.validation.models import LanguageModel, replace_weights
from jax_mxfp4.validation.scoring import Baseline, Distance, Likelihood

Rounding = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class FormatResult:
    """What a format does to a model.

    Attributes:
      format: its name.
      bits_per_weight: of the replaced matrices together, scales included.
      error: of the replaced matrices together, against the original ones.
      likelihood: of the text.
      distance: to the model with its original weights.
    """

    format: str
    bits_per_weight: float
    error: TensorError
    likelihood: Likelihood
    distance: Distance


@dataclass(frozen=True)
class NotApplicable:
    """A format that cannot hold some matrix.

    Attributes:
      format: its name.
      reason: which matrix, and why.
    """

    format: str
    reason: str


def round_weights(
    matrices: Mapping[str, jax.Array], rounding: Rounding
) -> tuple[dict[str, np.ndarray], TensorError]:
    """Round matrices and measure the error of all of them together.

    Args:
      matrices: name -> array [..., N, K].
      rounding: float32 [..., N, K] -> the same shape, such as `Format.round`.

    Returns:
      name -> rounded matrix, and the error.
    """
    rounded: dict[str, np.ndarray] = {}
    error = TensorError()
    for name, matrix in matrices.items():
        original = np.asarray(matrix, np.float32)
        rounded[name] = rounding(original)
        error += tensor_error(original, rounded[name])
    return rounded, error


def compare_formats(
    model: LanguageModel,
    matrices: Mapping[str, jax.Array],
    formats: Iterable[Format],
    baseline: Baseline,
) -> Iterator[FormatResult | NotApplicable]:
    """Store `matrices` of `model` in each format in turn.

    Args:
      model: float32, with its original weights.
      matrices: what is stored, from `select_matrices`; everything else stays as it is.
      formats: the formats.
      baseline: of `model` itself.

    Yields:
      One result for each format.
    """
    for format in formats:
        if reason := _why_not(format, matrices):
            yield NotApplicable(format.name, reason)
            continue
        rounded, error = round_weights(matrices, format.round)
        likelihood, distance = baseline.compare(replace_weights(model, rounded))
        bits = sum(format.bits(m.shape) * m.size for m in matrices.values())
        size = sum(m.size for m in matrices.values())
        yield FormatResult(format.name, bits / size, error, likelihood, distance)


def _why_not(format: Format, matrices: Mapping[str, jax.Array]) -> str | None:
    for name, matrix in matrices.items():
        if reason := format.why_not(matrix.shape):
            return f"{name}: {reason}"
    return None

"""Where quantization hurts: one part of a model at a time, the rest untouched."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import jax

from jax_mxfp4.validation.comparison import Rounding, round_weights
from jax_mxfp4.validation.errors import TensorError
from jax_mxfp4.validation.models import LanguageModel, replace_weights
from jax_mxfp4.validation.scoring import Baseline, Distance, Likelihood

Grouping = Literal["tensor", "layer", "kind"]

# Up to the first number between dots: "layers.3" of "layers.3.attention.qkv.weight".
_LAYER = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one part of a model does.

    Attributes:
      part: name of a matrix, a layer, or a kind of matrix over all layers.
      elements: weights in it.
      error: of those weights.
      likelihood: of the text.
      distance: to the model with its original weights; parts are ranked by its `kl`.
    """

    part: str
    elements: int
    error: TensorError
    likelihood: Likelihood
    distance: Distance


def group(names: Iterator[str] | Mapping[str, object], by: Grouping) -> dict[str, list[str]]:
    """Sort the names of matrices into parts.

    Args:
      names: such as ``layers.3.attention.qkv.weight``.
      by: "tensor": each is a part; "layer": all of ``layers.3``; "kind": all of
        ``layers.*.attention.qkv.weight``. Names without a layer number are parts by themselves.

    Returns:
      part -> names, in the order of `names`.
    """
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(_part(name, by), []).append(name)
    return parts


def _part(name: str, by: Grouping) -> str:
    if by == "layer":
        match = _LAYER.match(name)
        return match.group() if match else name
    return _INDEX.sub("*", name, count=1) if by == "kind" else name


def sensitivities(
    model: LanguageModel,
    matrices: Mapping[str, jax.Array],
    rounding: Rounding,
    baseline: Baseline,
    by: Grouping = "tensor",
) -> Iterator[Sensitivity]:
    """Quantize one part of `matrices` at a time.

    Args:
      model: float32, with its original weights.
      matrices: from `select_matrices`.
      rounding: such as `Format.round`.
      baseline: of `model` itself.
      by: see `group`.

    Yields:
      One result for each part, not ranked.
    """
    for part, names in group(matrices, by).items():
        chosen = {name: matrices[name] for name in names}
        rounded, error = round_weights(chosen, rounding)
        likelihood, distance = baseline.compare(replace_weights(model, rounded))
        elements = sum(matrix.size for matrix in chosen.values())
        yield Sensitivity(part, elements, error, likelihood, distance)

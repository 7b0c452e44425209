"""Options and reports that the calibrations of all models share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jax.typing import ArrayLike

from jax_mxfp4.quantizers.gptq import GPTQ_RULES, GptqRule

Progress = Callable[[str, int, int], None]
"""Called after each weight with (name, weights done so far, weights in all)."""


@dataclass(frozen=True, kw_only=True)
class GptqOptions:
    """How `calibrate_and_quantize` rounds.

    Attributes:
      scale_rule: see `gptq`.
      damping: see `gptq`.
      activation_order: see `gptq`.
      batch: sequences that are processed at a time.

    Raises:
      ValueError: an option is outside its range.
    """

    scale_rule: GptqRule = "loss"
    damping: float = 0.01
    activation_order: bool = True
    batch: int = 4

    def __post_init__(self) -> None:
        """Check the values."""
        if self.scale_rule not in GPTQ_RULES:
            raise ValueError(f"scale_rule: expected one of {GPTQ_RULES}, found {self.scale_rule!r}")
        if not 0 < self.damping < np.inf:
            raise ValueError(f"damping: expected a number above 0, found {self.damping}")
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1, found {self.batch}")


DEFAULT_OPTIONS = GptqOptions()


@dataclass(frozen=True)
class WeightReport:
    """What rounding did to one weight.

    Attributes:
      name: of the linear layer, or of the experts' parameter.
      output_sqnr_db: signal to error of the layer's outputs on the calibration inputs, in dB:
        ``tr(W H W^T) / tr((W - Q) H (W - Q)^T)``, W being what was rounded.
    """

    name: str
    output_sqnr_db: float


def output_sqnr_db(wanted: np.ndarray, found: np.ndarray, hessian: np.ndarray) -> float:
    """Return the output SQNR of rounding W to Q, both [..., N, K], given Hessians [..., K, K]."""
    error = wanted - found
    signal = float(np.sum((wanted @ hessian) * wanted))
    noise = float(np.sum((error @ hessian) * error))
    return 10 * float(np.log10(signal / noise)) if noise > 0 else float("inf")


def calibration_windows(ids: ArrayLike | Sequence[int], window: int, count: int) -> np.ndarray:
    """Return `count` windows spread evenly over a text, int32 [count, window].

    Args:
      ids: the text's tokens, integers [T].
      window: length of a window.
      count: how many; they do not overlap.

    Raises:
      ValueError: the text is too short, or a number is below 1.
    """
    ids = np.asarray(ids, np.int32)
    if window < 1 or count < 1 or ids.ndim != 1 or len(ids) < window * count:
        raise ValueError(
            f"ids: expected at least {count} x {window} tokens of one text, found {ids.shape}"
        )
    starts = np.linspace(0, len(ids) - window, count).astype(np.int64)
    return ids[starts[:, None] + np.arange(window)]

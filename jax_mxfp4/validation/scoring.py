"""Running a model over windows of text: perplexity, and the distance to another model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_mxfp4.validation.errors import kl_divergence, negative_log_likelihood, top1_agreement
from jax_mxfp4.validation.models import LanguageModel
from jax_mxfp4.validation.windows import Windows

TIE_MARGIN = 0.05
"""Default smallest difference between the two best logits that counts as a preference."""


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts a text.

    Attributes:
      tokens: scored tokens.
      mean: mean negative log likelihood, in nats.
      standard_error: of that mean, tokens taken as independent.
    """

    tokens: int
    mean: float
    standard_error: float

    @property
    def perplexity(self) -> float:
        """exp(mean)."""
        return math.exp(self.mean)


@dataclass(frozen=True)
class Distance:
    """How far a model's predictions are from those of a base model.

    Attributes:
      kl: mean over scored tokens of KL(base || model), in nats.
      kl_99: its 99th percentile.
      top1: share of tokens with the same first choice, among those where the base has one.
      ties: share of tokens where the base has none: its two best logits are within the margin.
    """

    kl: float
    kl_99: float
    top1: float
    ties: float


@jax.jit
def _likelihoods(model: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return -log p of every token after the first, [B, T - 1], and the logits, [B, T - 1, V]."""
    logits = model(tokens)[:, :-1]
    return negative_log_likelihood(logits, tokens[:, 1:]), logits


@jax.jit
def _distances(
    model: Any, tokens: jax.Array, base_logits: jax.Array, tie_margin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    nll, logits = _likelihoods(model, tokens)
    agrees, decided = top1_agreement(base_logits, logits, tie_margin)
    return nll, kl_divergence(base_logits, logits), agrees, decided


def likelihood(model: LanguageModel, windows: Windows, batch: int = 8) -> Likelihood:
    """Return how well `model` predicts `windows`, `batch` of them at a time.

    Raises:
      ValueError: a logit is NaN.
    """
    scores = (
        _select((_likelihoods(model, tokens)[0],), scored)
        for tokens, scored in windows.batches(batch)
    )
    return _likelihood(*_join(scores))


class Baseline:
    """The predictions of one model, for others to be compared with.

    All its logits stay in memory: windows x window x vocabulary x 4 bytes.

    Attributes:
      likelihood: of the base model.
    """

    def __init__(
        self,
        model: LanguageModel,
        windows: Windows,
        batch: int = 8,
        tie_margin: float = TIE_MARGIN,
    ) -> None:
        """Run `model` over `windows`.

        Raises:
          ValueError: a logit is NaN.
        """
        self._tie_margin = tie_margin
        self._batches = []
        scores = []
        for tokens, scored in windows.batches(batch):
            nll, logits = _likelihoods(model, tokens)
            self._batches.append((tokens, scored, logits))
            scores.append(_select((nll,), scored))
        self.likelihood = _likelihood(*_join(scores))

    def compare(self, model: LanguageModel) -> tuple[Likelihood, Distance]:
        """Run another `model` with the same vocabulary over the same windows.

        Raises:
          ValueError: a logit is NaN.
        """
        nll, kl, agrees, decided = _join(
            _select(_distances(model, tokens, logits, np.float32(self._tie_margin)), scored)
            for tokens, scored, logits in self._batches
        )
        distance = Distance(
            kl=float(np.mean(kl)),
            kl_99=float(np.percentile(kl, 99)),
            top1=float(np.mean(agrees[decided])) if decided.any() else math.nan,
            ties=float(1 - np.mean(decided)),
        )
        return _likelihood(nll), distance


def _select(arrays: tuple[jax.Array, ...], scored: np.ndarray) -> tuple[np.ndarray, ...]:
    """Keep the scored ones of values [B, T - 1] that belong to the tokens after the first."""
    return tuple(np.asarray(array)[scored[:, 1:]] for array in arrays)


def _join(batches: Iterable[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Concatenate the batches of each kind of value; floating-point ones become float64."""
    joined = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return tuple(a if a.dtype == bool else a.astype(np.float64) for a in joined)


def _likelihood(nll: np.ndarray) -> Likelihood:
    if np.isnan(nll).any():
        raise ValueError(
            f"the model's logits are NaN at {np.isnan(nll).sum()} of {nll.size} tokens"
        )
    error = float(np.std(nll)) / math.sqrt(nll.size)
    return Likelihood(nll.size, float(np.mean(nll)), error)

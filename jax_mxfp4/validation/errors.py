"""How far one result is from another: measures of tensors and of logits.

Tensors are compared in NumPy with float64 sums. Logits are compared where they are, in float32
below `jax.jit`, because a vocabulary times a text is large.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Elements that are compared at a time, as float64.
_CHUNK = 2**22


@dataclass(frozen=True)
class TensorError:
    """Sums over the elements of an expected x and an actual y, from which the measures follow.

    Errors of several tensors add up: ``sum(errors, TensorError())`` measures all of them as one.

    Attributes:
      elements: how many elements were compared.
      signal: sum of x^2.
      noise: sum of (x - y)^2.
      power: sum of y^2.
      product: sum of x * y.
      largest: the largest |x - y|; NaN where either side has one.
    """

    elements: int = 0
    signal: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def __add__(self, other: "TensorError") -> "TensorError":
        """Return the error of both tensors taken together."""
        return TensorError(
            self.elements + other.elements,
            self.signal + other.signal,
            self.noise + other.noise,
            self.power + other.power,
            self.product + other.product,
            float(np.maximum(self.largest, other.largest)),  # unlike max, keeps NaN
        )

    @property
    def relative_rms(self) -> float:
        """Root mean square error over the root mean square of x; 0 where both are equal."""
        if self.noise == 0:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio, 10 log10(signal / noise), in dB.

        Infinite where nothing differs, minus infinite where x is zero and y is not.
        """
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between x and y; NaN where one of them is zero."""
        norms = math.sqrt(self.signal) * math.sqrt(self.power)
        return self.product / norms if norms else math.nan


def tensor_error(expected: Any, actual: Any) -> TensorError:
    """Compare two tensors element by element.

    Args:
      expected: array of any shape and real dtype.
      actual: array of the same shape.

    Raises:
      ValueError: the shapes differ.
    """
    x, y = np.asarray(expected), np.asarray(actual)
    if x.shape != y.shape:
        raise ValueError(f"actual: expected shape {list(x.shape)}, found {list(y.shape)}")
    x, y = x.reshape(-1), y.reshape(-1)
    total = TensorError()
    for first in range(0, x.size, _CHUNK):
        # Infinite values make the sums infinite or NaN, which says enough.
        with np.errstate(invalid="ignore", over="ignore"):
            chunk = slice(first, first + _CHUNK)
            total += _chunk_error(x[chunk].astype(np.float64), y[chunk].astype(np.float64))
    return total


def _chunk_error(x: np.ndarray, y: np.ndarray) -> TensorError:
    difference = x - y
    return TensorError(
        x.size,
        float(x @ x),
        float(difference @ difference),
        float(y @ y),
        float(x @ y),
        float(np.max(np.abs(difference))),
    )


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -log softmax(logits)[target] in nats.

    Args:
      logits: floating point [..., V].
      targets: integers [...], each in [0, V).

    Returns:
      float32 [...].
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def kl_divergence(base_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """Return KL(P || Q) = sum_v P[v] (log P[v] - log Q[v]) in nats, P being the base.

    Computed in float32: values below about 1e-6 are rounding, and can be negative.

    Args:
      base_logits: floating point [..., V], of P.
      logits: the same shape, of Q.

    Returns:
      float32 [...].
    """
    log_p, log_q = (jax.nn.log_softmax(side.astype(jnp.float32)) for side in (base_logits, logits))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def top1_agreement(
    base_logits: jax.Array, logits: jax.Array, tie_margin: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Say where both sides prefer the same token, and where the base has a clear preference.

    Where the base's two best logits are closer than `tie_margin`, any rounding may swap them: a
    disagreement there says nothing, so such positions are to be left out.

    Args:
      base_logits: floating point [..., V], V at least 2.
      logits: the same shape.
      tie_margin: smallest difference of logits that counts as a preference.

    Returns:
      (agrees, decided), both bool [...].
    """
    best = jax.lax.top_k(base_logits, 2)[0]
    decided = best[..., 0] - best[..., 1] >= jnp.asarray(tie_margin, best.dtype)
    return jnp.argmax(base_logits, axis=-1) == jnp.argmax(logits, axis=-1), decided

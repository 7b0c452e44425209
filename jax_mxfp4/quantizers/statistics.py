"""What calibration keeps of a linear layer's inputs: sums of products, in float64 on the host."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mxfp4.quantizers.gptq import damped


@dataclass
class InputStatistics:
    """Sums over calibration tokens for layers that share their input.

    With x the input in the model quantized so far and z the same token's input in the original
    model, where that is followed too:

    Attributes:
      hessian: sum x x^T, float64 [K, K].
      cross: sum z x^T, float64 [K, K]; None where the original model is not followed.
      drift: sum (r - s) x^T, float64 [D, K], with r the residual stream that the layer's result
        is added to in the original model and s in the quantized one; None where there is none.
    """

    hessian: np.ndarray
    cross: np.ndarray | None = None
    drift: np.ndarray | None = None

    @classmethod
    def zeros(cls, size: int, *, follow: bool, stream: int | None) -> "InputStatistics":
        """Return empty sums for inputs of `size` K and, if not None, a residual `stream` D."""
        return cls(
            np.zeros((size, size)),
            np.zeros((size, size)) if follow else None,
            np.zeros((stream, size)) if follow and stream else None,
        )

    def add(self, x: jax.Array, original: jax.Array | None, drift: jax.Array | None) -> None:
        """Add a batch of tokens: x and original [..., K], drift [..., D]."""
        self.hessian += _products(x, x)
        if self.cross is not None and original is not None:
            self.cross += _products(original, x)
        if self.drift is not None and drift is not None:
            self.drift += _products(drift, x)

    def corrected(self, weight: np.ndarray, damping: float) -> np.ndarray:
        """Return the weight that on inputs x comes closest to what W gives on inputs z.

        It minimizes ``sum |W z + r - s - V x|^2 + damping |V - W|^2`` over V, float64 [N, K]: the
        rounding of earlier layers has changed the inputs, and part of that can be undone here
        (asymmetric calibration, as in GPTAQ, arXiv:2504.02692, here in closed form).

        Args:
          weight: W [N, K].
          damping: as in `gptq`.
        """
        difference = np.zeros_like(weight, np.float64)
        if self.cross is not None:
            difference += weight @ (self.cross - self.hessian)
        if self.drift is not None:
            difference += self.drift
        # Symmetric, so that solving from the left gives the product with the inverse.
        return weight + np.linalg.solve(damped(self.hessian, damping), difference.T).T


@jax.jit
def _device_products(left: jax.Array, right: jax.Array) -> jax.Array:
    left, right = (x.reshape(-1, x.shape[-1]).astype(jnp.float32) for x in (left, right))
    return jnp.matmul(left.T, right, precision=lax.Precision.HIGHEST)


def _products(left: jax.Array, right: jax.Array) -> np.ndarray:
    return np.asarray(_device_products(left, right), np.float64)

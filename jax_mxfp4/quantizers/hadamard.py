"""Rotation of blocks by a Hadamard matrix, which makes heavy tails Gaussian.

The normalized Hadamard matrix of order 32 (Sylvester's) is symmetric and its own inverse. Applied
to every block of 32 along an axis that two factors share, it changes no product::

    x @ W.T == rotate(x) @ rotate(W).T

but an outlier's energy is spread over its block, and the values that share a scale become nearly
Gaussian, for which MXFP4 is best. Rotating the blocks themselves and nothing wider is what keeps
it from raising all scales (MR-GPTQ, arXiv:2509.23202; wider rotations hurt: arXiv:2511.04214).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_layers import MXFP4Dense
from jax_mxfp4.format import BLOCK_SIZE


def hadamard_matrix() -> np.ndarray:
    """Return the normalized Hadamard matrix of order 32, float32 [32, 32]."""
    matrix = np.ones((1, 1))
    while len(matrix) < BLOCK_SIZE:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(BLOCK_SIZE)).astype(np.float32)


def rotate(x: jax.Array) -> jax.Array:
    """Multiply every block of 32 along the last axis by the Hadamard matrix, in float32.

    Args:
      x: floating point [..., K], K a multiple of 32.

    Returns:
      x.dtype [..., K]; rotating twice gives x back up to rounding.

    Raises:
      ValueError: K is not a multiple of 32.
    """
    if x.ndim == 0 or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"x: expected [..., K], K a multiple of {BLOCK_SIZE}, found {x.shape}")
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK_SIZE).astype(jnp.float32)
    rotated = jnp.matmul(blocks, hadamard_matrix(), precision=lax.Precision.HIGHEST)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_both(matrix: np.ndarray) -> np.ndarray:
    """Return R^T A R of a float64 matrix [K, K] (or [..., K, K]), R the rotation of `rotate`."""
    matrix = _rotate_host(matrix)
    return np.swapaxes(_rotate_host(np.swapaxes(matrix, -1, -2)), -1, -2)


def _rotate_host(matrix: np.ndarray) -> np.ndarray:
    blocks = matrix.reshape(*matrix.shape[:-1], -1, BLOCK_SIZE)
    return (blocks @ hadamard_matrix().astype(matrix.dtype)).reshape(matrix.shape)


class RotatedDense(nnx.Module):
    """A linear layer whose packed weight is rotated: it rotates its inputs to match.

    Attributes:
      dense: the packed layer, with weight ``rotate(W)``.
    """

    def __init__(self, dense: MXFP4Dense) -> None:
        """Wraps `dense`."""
        self.dense = dense

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer to the last axis of `inputs` [..., K]."""
        return self.dense(rotate(inputs))

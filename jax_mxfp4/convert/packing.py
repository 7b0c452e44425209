"""How one matrix is packed when a checkpoint is converted."""

import jax.numpy as jnp
import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.packing_reader import Packer
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE
from jax_mxfp4.quantize import SCALE_RULES, ScaleRule, quantize

# Elements that are quantized at a time: what XLA holds meanwhile is a few times this.
_CHUNK = 2**22


def round_to_nearest(scale_rule: ScaleRule = "even") -> Packer:
    """Return the `Packer` that rounds every element to nearest, as `jax_mxfp4.quantize` does.

    Args:
      scale_rule: "floor", "even", "rceil" or "mse".

    Raises:
      ValueError: the rule is unknown.
    """
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"scale_rule must be one of {SCALE_RULES}, got {scale_rule!r}")

    def pack(name: str, matrix: np.ndarray) -> MXFP4Array:
        del name
        rows, columns = matrix.shape
        scales = np.empty((rows, columns // BLOCK_SIZE), np.uint8)
        blocks = np.empty((*scales.shape, BLOCK_BYTES), np.uint8)
        step = max(1, _CHUNK // columns)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            packed = quantize(jnp.asarray(matrix[part]), scale_rule)
            blocks[part], scales[part] = packed.blocks, packed.scales
        return MXFP4Array(blocks, scales)

    return pack

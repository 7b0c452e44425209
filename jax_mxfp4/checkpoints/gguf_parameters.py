"""Parameters of a GPT-OSS model from the tensors of a GGUF file."""

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.gguf_blocks import dequantize_q8_0, unpack_mxfp4
from jax_mxfp4.checkpoints.gpt_oss_layout import ParameterSpec, Source
from jax_mxfp4.checkpoints.reader import Reader
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE

# Elements that are converted at a time: what is held beyond the result is a few times this.
_CHUNK = 2**24
_VALUES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "Q8_0": np.dtype(np.float32),
}


def read_gguf(reader: Reader, source: Source, spec: ParameterSpec) -> np.ndarray | MXFP4Array:
    """Read one parameter, a few rows of its first axis at a time.

    Returns:
      `MXFP4Array` of NumPy arrays for a packed parameter; else an array in the stored element
      type, float32 where that is Q8_0 or two stored halves have different types.
    """
    if spec.packed:
        scales = np.empty((*spec.shape[:-1], spec.shape[-1] // BLOCK_SIZE), np.uint8)
        blocks = np.empty((*scales.shape, BLOCK_BYTES), np.uint8)
        for where, _, raw in _pieces(reader, source):
            blocks[where], scales[where] = unpack_mxfp4(raw)
        return MXFP4Array(blocks, scales)
    dtypes = [_VALUES[reader.tensors[tensor.name].dtype] for tensor in source.tensors]
    dense = np.empty(spec.shape, np.result_type(*dtypes))
    for where, dtype, raw in _pieces(reader, source):
        dense[where] = dequantize_q8_0(raw) if dtype == "Q8_0" else raw
    return dense


def _pieces(reader: Reader, source: Source) -> Iterator[tuple[tuple[slice, ...], str, np.ndarray]]:
    """Yield (where in the parameter, stored element type, what is stored there)."""
    for number, tensor in enumerate(source.tensors):
        alternating = (slice(number, None, 2),) if len(source.tensors) == 2 else ()
        rows = max(1, _CHUNK // math.prod(tensor.shape[1:]))
        for first in range(0, tensor.shape[0], rows):
            part = slice(first, min(first + rows, tensor.shape[0]))
            dtype = reader.tensors[tensor.name].dtype
            yield (part, *alternating), dtype, reader.read(tensor.name, part)

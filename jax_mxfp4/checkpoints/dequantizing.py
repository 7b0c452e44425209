"""Values of whole checkpoints in bfloat16 and wider types, a few megabytes at a time."""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.gguf_blocks import dequantize_q8_0
from jax_mxfp4.checkpoints.logical_tensors import (
    MXFP4,
    LogicalTensor,
    boxes,
    logical_tensors,
    read_packed,
)
from jax_mxfp4.checkpoints.reader import Reader, read_part
from jax_mxfp4.checkpoints.stored_array import Part
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE, E2M1_VALUES, E8M0_BIAS, E8M0_NAN

_DTYPES = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16)))
_Q8_0 = "Q8_0"
_FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_INTEGERS = ("BOOL", *(f"{kind}{bits}" for kind in "IU" for bits in (8, 16, 32, 64)))
# Blocks that are decoded at a time, so that what NumPy makes of their indices stays small.
_STEP = 2**14


@dataclass(frozen=True, eq=False)
class Chunk:
    """Part of a tensor, decoded.

    Attributes:
      name: of the tensor; see `LogicalTensor`.
      shape: of the whole tensor.
      part: which part this is, so that ``tensor[chunk.part] = chunk.values`` over all chunks of a
        tensor fills it.
      values: the values of that part.
    """

    name: str
    shape: tuple[int, ...]
    part: Part
    values: np.ndarray


def dequantized_chunks(
    reader: Reader,
    dtype: DTypeLike = ml_dtypes.bfloat16,
    max_bytes: int = 2**26,
    names: Iterable[str] | None = None,
) -> Iterator[Chunk]:
    """Yield all tensors of a checkpoint, dequantized, in chunks: no tensor is ever held as a whole.

    ::

        for chunk in dequantized_chunks(open_checkpoint("path/to/gpt-oss-20b"), np.float32):
            print(chunk.name, chunk.part, np.abs(chunk.values).max())

    Chunks of a tensor come one after the other, in C order. Apart from the chunk, which the caller
    may keep, what is in memory is what it was made of and a few megabytes.

    Args:
      reader: an open checkpoint of any model, in any layout; see `logical_tensors`.
      dtype: float32, bfloat16 or float16, of all tensors of floating-point numbers. MXFP4 values
        are decoded exactly and rounded once; bfloat16 and float32 hold all that do not overflow.
        Integers and booleans stay what they are.
      max_bytes: the size of a chunk's values is at most this. It must have room for a block of 32.
      names: the tensors that are wanted, in this order; None for all.

    Raises:
      CheckpointError: there is no tensor of one of `names`, or a tensor is stored in a type that
        cannot be decoded, as other quantized types of GGUF files; all are listed, before the first
        chunk. Or a file cannot be read, or has become shorter.
      TypeError: `dtype` is another type.
      ValueError: `max_bytes` is too small.
    """
    dtype = np.dtype(dtype)
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, found {dtype}")
    if max_bytes < BLOCK_SIZE * dtype.itemsize:
        raise ValueError(
            f"max_bytes: expected at least {BLOCK_SIZE * dtype.itemsize}, the size of a block in "
            f"{dtype}, found {max_bytes}"
        )
    tensors = logical_tensors(reader)
    wanted = list(tensors if names is None else names)
    problems = [f"no tensor {name!r}" for name in wanted if name not in tensors]
    problems += [
        f"tensor {name!r}: {tensors[name].dtype} cannot be decoded"
        for name in wanted
        if name in tensors and tensors[name].dtype not in (MXFP4, _Q8_0, *_FLOATS, *_INTEGERS)
    ]
    if problems:
        raise CheckpointError(reader.path, problems)
    # A generator of its own, so that the checks above come before the first chunk is asked for.
    return _chunks(reader, [tensors[name] for name in wanted], dtype, max_bytes)


def decode_blocks(blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Decode packed blocks without JAX: no device is started for it.

    Args:
      blocks: uint8 [..., G, 16].
      scales: uint8 [..., G].
      dtype: float32, bfloat16 or float16.

    Returns:
      `dtype` [..., 32 * G], the values of `jax_mxfp4.format.decode`.
    """
    table = _table(dtype)
    codes, exponents = blocks.reshape(-1, BLOCK_BYTES), scales.reshape(-1, 1).astype(np.uint16)
    pairs = np.empty(codes.shape, table.dtype)
    for first in range(0, len(codes), _STEP):
        rows = slice(first, first + _STEP)
        np.take(table, exponents[rows] << np.uint16(8) | codes[rows], out=pairs[rows], mode="clip")
    return pairs.view(dtype).reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK_SIZE)


def _chunks(
    reader: Reader, tensors: Iterable[LogicalTensor], dtype: np.dtype, max_bytes: int
) -> Iterator[Chunk]:
    for tensor in tensors:
        if tensor.dtype in (MXFP4, _Q8_0):
            shape = (*tensor.shape[:-1], tensor.shape[-1] // BLOCK_SIZE)
            for part in boxes(shape, max_bytes // (BLOCK_SIZE * dtype.itemsize)):
                if tensor.dtype == MXFP4:
                    values = decode_blocks(*read_packed(reader, tensor, part), dtype)
                else:
                    values = dequantize_q8_0(read_part(reader, tensor.name, part)).astype(dtype)
                yield Chunk(tensor.name, tensor.shape, _elements(part, shape), values)
            continue
        # While it is converted, a chunk is in memory in both types.
        stored_item = tensor.nbytes // max(1, math.prod(tensor.shape))
        for part in boxes(tensor.shape, max_bytes // max(stored_item, dtype.itemsize)):
            values = read_part(reader, tensor.name, part)
            if tensor.dtype in _FLOATS:
                values = values.astype(dtype, copy=False)
            yield Chunk(tensor.name, tensor.shape, part, values)


def _elements(part: Part, shape: tuple[int, ...]) -> Part:
    """Return a part of `shape`, whose last axis counts blocks, as one that counts elements."""
    if len(part) < len(shape):
        return part
    *leading, last = part
    return (*leading, slice(last.start * BLOCK_SIZE, last.stop * BLOCK_SIZE))


@functools.cache
def _table(dtype: np.dtype) -> np.ndarray:
    """Return the two values of every byte of codes under every scale, [65536] of two `dtype`."""
    byte, scale = np.arange(256), np.arange(256)
    codes = np.stack([byte & 15, byte >> 4], axis=-1)
    values = np.ldexp(np.array(E2M1_VALUES)[codes], (scale - E8M0_BIAS)[:, None, None])
    values[E8M0_NAN] = np.nan
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    return rounded.view(f"u{2 * dtype.itemsize}").reshape(-1)

"""What the tensors of a checkpoint hold, as far as it can be said without a model."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jax_mxfp4.checkpoints.gpt_oss_loader import Progress
from jax_mxfp4.checkpoints.logical_tensors import (
    MXFP4,
    LogicalTensor,
    boxes,
    logical_tensors,
    read_packed,
)
from jax_mxfp4.checkpoints.reader import Reader
from jax_mxfp4.format import BLOCK_BYTES, E8M0_NAN

# Bytes that are read, and counted, together; NumPy counts them as 64-bit integers.
_READ_BYTES = 2**24
_COUNT_BYTES = 2**18
_MAGNITUDES = np.arange(16) & 7


@dataclass(frozen=True, eq=False)
class PackedStatistics:
    """How often each element code stands under each scale in a packed tensor.

    Attributes:
      counts: elements by scale byte and code, int64 [256, 16].
    """

    counts: np.ndarray

    @property
    def elements(self) -> int:
        """How many elements there are."""
        return int(self.counts.sum())

    @property
    def zeros(self) -> int:
        """Elements whose code is 0 or -0."""
        return int(self.counts[:, _MAGNITUDES == 0].sum())

    @property
    def saturated(self) -> int:
        """Elements whose code is 6 or -6, the largest magnitude."""
        return int(self.counts[:, _MAGNITUDES == 7].sum())

    @property
    def scales(self) -> np.ndarray:
        """How many blocks have each scale byte, int64 [256]."""
        return self.counts.sum(axis=1) // (2 * BLOCK_BYTES)

    @property
    def nan_scales(self) -> int:
        """Scale bytes that are NaN (255)."""
        return int(self.scales[E8M0_NAN])

    @property
    def scale_range(self) -> tuple[int, int] | None:
        """Smallest and largest scale byte that is a number; None if all are NaN."""
        used = np.flatnonzero(self.scales[:E8M0_NAN])
        return (int(used[0]), int(used[-1])) if used.size else None


@dataclass(frozen=True)
class TensorSummary:
    """One row of an inspection.

    Attributes:
      name: of the tensor, see `LogicalTensor`.
      dtype: the stored element type, "MXFP4" for a packed tensor.
      shape: logical shape, [..., K] for packed elements.
      nbytes: its size in the files.
      packed: statistics of a packed tensor, None for others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    packed: PackedStatistics | None


def summarize(reader: Reader, progress: Progress | None = None) -> Iterator[TensorSummary]:
    """Yield a summary of each tensor of any checkpoint; see `logical_tensors`.

    Packed tensors are read a few megabytes at a time, others not at all.

    Args:
      reader: an open checkpoint.
      progress: called after each tensor with (name, bytes so far, bytes of all), of packed ones.
    """
    tensors = logical_tensors(reader).values()
    total = sum(tensor.nbytes for tensor in tensors if tensor.dtype == MXFP4)
    done = 0
    for tensor in tensors:
        is_packed = tensor.dtype == MXFP4
        packed = _count(reader, tensor) if is_packed else None
        yield TensorSummary(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, packed)
        if is_packed and progress is not None:
            done += tensor.nbytes
            progress(tensor.name, done, total)


def _count(reader: Reader, tensor: LogicalTensor) -> PackedStatistics:
    pairs = np.zeros((256, 256), np.int64)  # by scale and by byte of two codes
    for part in boxes(tensor.part_shape, _READ_BYTES // BLOCK_BYTES):
        blocks, scales = read_packed(reader, tensor, part)
        keys = scales[..., None].astype(np.uint16) << np.uint16(8) | blocks
        keys = keys.reshape(-1)
        for first in range(0, keys.size, _COUNT_BYTES):
            part_keys = keys[first : first + _COUNT_BYTES]
            pairs += np.bincount(part_keys, minlength=pairs.size).reshape(pairs.shape)
    high_low = pairs.reshape(256, 16, 16)
    return PackedStatistics(high_low.sum(axis=1) + high_low.sum(axis=2))

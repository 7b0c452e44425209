"""What the tensors of a checkpoint hold, as far as it can be said without a model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jax_mxfp4.checkpoints.reader import Reader, TensorInfo
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE, E8M0_NAN

_BLOCKS = re.compile(r"(?P<stem>.+)(?P<joint>[_.])blocks")
# Bytes that are looked at together; NumPy counts them as 64-bit integers.
_CHUNK_BYTES = 2**22
_BYTES = np.arange(256)
# How many of the two codes in each byte are a zero (0, -0), or the largest magnitude (6, -6).
_ZEROS = (_BYTES & 7 == 0).astype(np.int64) + (_BYTES >> 4 & 7 == 0)
_SATURATED = (_BYTES & 7 == 7).astype(np.int64) + (_BYTES >> 4 & 7 == 7)


@dataclass(frozen=True)
class PackedStatistics:
    """Counts over the blocks of a packed tensor.

    Attributes:
      elements: how many there are.
      zeros: elements whose code is 0 or -0.
      saturated: elements whose code is 6 or -6, the largest magnitude.
      nan_scales: scale bytes that are NaN (255).
      scale_range: smallest and largest scale byte that is a number; None if all are NaN.
    """

    elements: int
    zeros: int
    saturated: int
    nan_scales: int
    scale_range: tuple[int, int] | None


@dataclass(frozen=True)
class TensorSummary:
    """One row of an inspection: a stored tensor, or the pair of blocks and scales.

    Attributes:
      name: as stored; of a pair, without `blocks`.
      dtype: the stored element type, "MXFP4" for a pair.
      shape: logical shape, [..., K] for packed elements.
      nbytes: its size in the files.
      packed: statistics of a packed tensor, None for others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    packed: PackedStatistics | None


def summarize(reader: Reader) -> Iterator[TensorSummary]:
    """Yield a summary of each tensor; blocks and scales that belong together are one.

    Packed tensors are read a few megabytes at a time, others not at all.
    """
    scales_of = _pairs(reader)
    paired = set(scales_of.values())
    for name, info in reader.tensors.items():
        if name in paired:
            continue
        if name in scales_of:
            scales = reader.tensors[scales_of[name]]
            stem = name.removesuffix("blocks").rstrip("_.")
            shape = (*info.shape[:-2], info.shape[-2] * BLOCK_SIZE)
            chunks = _paired_chunks(reader, info, scales)
            nbytes = info.nbytes + scales.nbytes
            yield TensorSummary(stem, "MXFP4", shape, nbytes, _count(chunks))
        elif info.dtype == "MXFP4":
            counts = _count(_gguf_chunks(reader, info))
            yield TensorSummary(name, info.dtype, info.shape, info.nbytes, counts)
        else:
            yield TensorSummary(name, info.dtype, info.shape, info.nbytes, None)


def _pairs(reader: Reader) -> dict[str, str]:
    """Return name of blocks -> name of the scales that belong to them."""
    pairs = {}
    for name, info in reader.tensors.items():
        match = _BLOCKS.fullmatch(name)
        scales = match and reader.tensors.get(f"{match['stem']}{match['joint']}scales")
        if scales and len(info.shape) >= 2 and info.shape[-1] == BLOCK_BYTES:
            is_packed = info.dtype == scales.dtype == "U8" and scales.shape == info.shape[:-1]
            if is_packed:
                pairs[name] = scales.name
    return pairs


def _row_slices(info: TensorInfo) -> Iterator[slice]:
    rows = info.shape[0]
    step = max(1, rows * _CHUNK_BYTES // max(info.nbytes, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _paired_chunks(
    reader: Reader, blocks: TensorInfo, scales: TensorInfo
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for rows in _row_slices(blocks):
        yield reader.read(blocks.name, rows), reader.read(scales.name, rows)


def _gguf_chunks(reader: Reader, info: TensorInfo) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for rows in _row_slices(info):
        raw = reader.read(info.name, rows)
        yield raw[..., 1:], raw[..., 0]


def _count(chunks: Iterator[tuple[np.ndarray, np.ndarray]]) -> PackedStatistics:
    codes, scales = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for block_part, scale_part in chunks:
        # A part is one row at least, which may still be large.
        flat = block_part.reshape(-1)
        for first in range(0, flat.size, _CHUNK_BYTES):
            codes += np.bincount(flat[first : first + _CHUNK_BYTES], minlength=256)
        scales += np.bincount(scale_part.reshape(-1), minlength=256)
    used = np.flatnonzero(scales[:E8M0_NAN])
    return PackedStatistics(
        elements=2 * int(codes.sum()),
        zeros=int(codes @ _ZEROS),
        saturated=int(codes @ _SATURATED),
        nan_scales=int(scales[E8M0_NAN]),
        scale_range=(int(used[0]), int(used[-1])) if used.size else None,
    )

"""The tensors of any checkpoint as they are meant: blocks and scales that belong together are one.

Packed tensors are known by their names and shapes alone:

* `X_blocks` and `X_scales`, or `X.blocks` and `X.scales`: GPT-OSS, [..., K / 32, 16] and
  [..., K / 32];
* `X.weight_packed` and `X.weight_scale`: compressed-tensors, [N, K / 2] and [N, K / 32];
* tensors of type MXFP4 in GGUF files.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jax_mxfp4.checkpoints.compressed_tensors import PACKED, SCALE
from jax_mxfp4.checkpoints.gguf_blocks import unpack_mxfp4
from jax_mxfp4.checkpoints.reader import Reader, TensorInfo, read_part
from jax_mxfp4.checkpoints.stored_array import Part, box
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE

MXFP4 = "MXFP4"
"""The `LogicalTensor.dtype` of packed tensors."""

_BLOCKS = re.compile(r"(?P<stem>.+)(?P<joint>[_.])blocks")
_PACKED = re.compile(rf"(?P<stem>.+)\.{PACKED}")


@dataclass(frozen=True)
class LogicalTensor:
    """One tensor, stored as one or two.

    Attributes:
      name: as stored, of a pair without `blocks`; of compressed-tensors `X.weight`.
      dtype: the stored element type, "MXFP4" for a packed tensor.
      shape: logical shape, [..., K] for packed elements.
      stored: what is stored: blocks and scales, or one tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the files."""
        return sum(info.nbytes for info in self.stored)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape with blocks as the unit of a packed last axis: what parts are parts of."""
        if self.dtype != MXFP4:
            return self.shape
        return (*self.shape[:-1], self.shape[-1] // BLOCK_SIZE)


def logical_tensors(reader: Reader) -> dict[str, LogicalTensor]:
    """Return every tensor of `reader` by name, in its order."""
    tensors = reader.tensors
    pairs = {info.name: pair for info in tensors.values() if (pair := _pair(info, tensors))}
    scales = {pair.stored[1].name for pair in pairs.values()}
    found = (
        pairs.get(name) or LogicalTensor(name, info.dtype, info.shape, (info,))
        for name, info in tensors.items()
        if name not in scales
    )
    return {tensor.name: tensor for tensor in found}


def read_packed(
    reader: Reader, tensor: LogicalTensor, part: Part = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks uint8 [..., G, 16] and scales uint8 [..., G] of a packed tensor.

    Args:
      reader: the checkpoint.
      tensor: one of its tensors with the type MXFP4.
      part: of `tensor.part_shape`.
    """
    part = box(part, tensor.part_shape)
    if len(tensor.stored) == 1:
        return unpack_mxfp4(read_part(reader, tensor.stored[0].name, part))
    codes, scales = tensor.stored
    values = read_part(reader, scales.name, part)
    if len(codes.shape) == len(scales.shape):  # the blocks of a row one after the other
        last = part[-1]
        part = (*part[:-1], slice(last.start * BLOCK_BYTES, last.stop * BLOCK_BYTES))
    blocks = read_part(reader, codes.name, part)
    return blocks.reshape(*values.shape, BLOCK_BYTES), values


def boxes(shape: tuple[int, ...], limit: int) -> Iterator[Part]:
    """Yield parts of at most `limit` elements that make up an array of `shape`, in C order."""
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    # Neighbouring rows of the first axis of which a row is small enough.
    inner = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = next(axis for axis, elements in enumerate(inner) if elements <= limit)
    step = limit // inner[axis]
    for place in itertools.product(*map(range, shape[:axis])):
        for first in range(0, shape[axis], step):
            rows = slice(first, min(first + step, shape[axis]))
            yield (*(slice(index, index + 1) for index in place), rows)


def _pair(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> LogicalTensor | None:
    """Return the packed tensor that `info` holds the codes of, if it does."""
    if match := _BLOCKS.fullmatch(info.name):
        name, scales = match["stem"], tensors.get(f"{match['stem']}{match['joint']}scales")
        rows = info.shape[:-1] if info.shape[-1:] == (BLOCK_BYTES,) else None
    elif match := _PACKED.fullmatch(info.name):
        name, scales = f"{match['stem']}.weight", tensors.get(f"{match['stem']}.{SCALE}")
        *leading, packed = info.shape or (0,)
        rows = (*leading, packed // BLOCK_BYTES) if packed % BLOCK_BYTES == 0 else None
    else:
        return None
    if scales is None or not rows or scales.shape != rows or {info.dtype, scales.dtype} != {"U8"}:
        return None
    if name in tensors:  # two tensors cannot have one name
        return None
    return LogicalTensor(name, MXFP4, (*rows[:-1], rows[-1] * BLOCK_SIZE), (info, scales))

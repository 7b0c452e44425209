"""Parameters of a GPT-OSS model from the tensors of a GGUF file."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.gguf_blocks import dequantize_q8_0, unpack_mxfp4
from jax_mxfp4.checkpoints.gpt_oss_layout import ParameterSpec, Source
from jax_mxfp4.checkpoints.logical_tensors import boxes
from jax_mxfp4.checkpoints.reader import FileReader, Reader, read_part
from jax_mxfp4.checkpoints.stored_array import Part, aligned_empty, box, box_shape, shift
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE

# Elements that a thread converts at a time: few enough to stay in its processor's cache.
_CHUNK = 2**21
# Blocks that it repacks at a time: they go to their place while the cache has them.
_CACHED_BLOCKS = 2**13
_THREADS = 4
_VALUES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "Q8_0": np.dtype(np.float32),
}


@dataclass(frozen=True)
class _Piece:
    """A part of one stored tensor, and where it belongs.

    Attributes:
      name: of the tensor.
      stored: which part of it.
      where: index of that in the result.
    """

    name: str
    stored: Part
    where: tuple[slice, ...]


def read_gguf(
    reader: Reader, source: Source, spec: ParameterSpec, part: Part = ()
) -> np.ndarray | MXFP4Array:
    """Read one parameter, or a part of it, a few million elements at a time.

    Args:
      reader: a GGUF file.
      source: where the parameter lies.
      spec: what it is.
      part: of `spec.part_shape`.

    Returns:
      `MXFP4Array` of NumPy arrays for a packed parameter; else an array in the stored element
      type, float32 where that is Q8_0 or two stored halves have different types.
    """
    part = box(part, spec.part_shape)
    shape = box_shape(part)
    is_file = isinstance(reader, FileReader)
    # Other readers make whole rows of the first axis, at some cost: each once, and in order.
    axes, threads = (len(shape), _THREADS) if is_file else (1, 1)
    if spec.packed:
        blocks, scales = (
            aligned_empty(leaf, np.dtype(np.uint8)) for leaf in ((*shape, BLOCK_BYTES), shape)
        )

        def fill(piece: _Piece) -> None:
            raw = read_part(reader, piece.name, piece.stored)
            block_rows, scale_rows = blocks[piece.where], scales[piece.where]
            for few in boxes(raw.shape[:-1], _CACHED_BLOCKS):
                block_rows[few], scale_rows[few] = unpack_mxfp4(raw[few])

        _run(fill, _pieces(source, part, axes, _CHUNK // BLOCK_SIZE), threads)
        return MXFP4Array(blocks, scales)

    dtypes = {tensor.name: reader.tensors[tensor.name].dtype for tensor in source.tensors}
    if is_file and len(dtypes) == 1 and "Q8_0" not in dtypes.values():
        return read_part(reader, source.tensors[0].name, part)  # straight to where it stays
    dense = aligned_empty(shape, np.result_type(*(_VALUES[dtype] for dtype in dtypes.values())))

    def convert(piece: _Piece) -> None:
        if dtypes[piece.name] == "Q8_0":  # whole blocks are read, then cut
            raw = read_part(reader, piece.name, piece.stored[:-1])
            dense[piece.where] = dequantize_q8_0(raw)[..., piece.stored[-1]]
        else:
            dense[piece.where] = read_part(reader, piece.name, piece.stored)

    _run(convert, _pieces(source, part, axes, _CHUNK), threads)
    return dense


def _run(work: Callable[[_Piece], None], pieces: Iterable[_Piece], threads: int) -> None:
    with ThreadPoolExecutor(threads) as executor:
        for _ in executor.map(work, pieces):
            pass


def _pieces(source: Source, part: Part, axes: int, limit: int) -> Iterator[_Piece]:
    """Yield the pieces that make up `part` of a parameter.

    They are cut along the first `axes` axes, to have at most `limit` elements, or blocks.
    """
    for number, tensor in enumerate(source.tensors):
        alternate = len(source.tensors) == 2
        stored = part
        if alternate:
            # Row i of this half is row 2 i + number of the parameter.
            first, stop = ((at - number + 1) // 2 for at in (part[1].start, part[1].stop))
            stored = (part[0], slice(first, stop), *part[2:])
            skipped = 2 * first + number - part[1].start
        shape = box_shape(stored)
        inner = math.prod(shape[axes:])
        for piece in boxes(shape[:axes], max(1, limit // max(1, inner))):
            within = box(piece, shape)
            where = within
            if alternate:
                rows = slice(skipped + 2 * within[1].start, skipped + 2 * within[1].stop - 1, 2)
                where = (within[0], rows, *within[2:])
            yield _Piece(tensor.name, shift(within, stored), where)

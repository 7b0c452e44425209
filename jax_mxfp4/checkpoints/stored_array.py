"""Reading an array, or a part of it, out of a file.

Files are read with `preadv` and not through a memory map: the pages of a map count as memory of
this process, and a file that becomes shorter while it is mapped ends the process with SIGBUS, where
a read says so. As with a map, nothing is read that is not asked for.

Of files that are too large to stay in the page cache, the disk writes straight to where the array
lies (O_DIRECT), which spares the kernel a page and a copy for each page that is read. File systems
that cannot do that, and arrays that do not lie in memory as in the file modulo a block, are read
through the page cache as well, piece by piece.
"""

import errno
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_mxfp4.checkpoints.errors import CheckpointError

Part = tuple[slice, ...]
"""A box of an array: slices with step 1 of its first axes; of the other axes it has everything."""

# What a thread reads at a time, and how many do: enough to keep a fast disk busy.
_CHUNK_BYTES = 2**22
_THREADS = 4
# One more read costs as much time as so many bytes more.
_READ_COST = 2**16
# XLA's CPU client takes over arrays that are aligned like this, and copies all others.
_ALIGNMENT = 64
# Of every disk and file system so far: what is read without the page cache begins and ends there.
_BLOCK_BYTES = 4096


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype, offset: int = 0) -> np.ndarray:
    """Return an uninitialized array that `jax.device_put` need not copy for a CPU.

    Args:
      shape: of the array.
      dtype: of its elements.
      offset: where it begins in a file. Its address is the same modulo the size of a block, if that
        is aligned well enough.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _BLOCK_BYTES, np.uint8)
    place = offset if offset % _ALIGNMENT == 0 else 0
    start = (place - memory.ctypes.data) % _BLOCK_BYTES
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def fits_page_cache(nbytes: int) -> bool:
    """Whether memory could keep files of `nbytes` beside what is read from them.

    If not, the kernel would drop the beginning of the files, and much else, before they could be
    read for a second time. Finding memory for pages is then the larger part of the work of reading.
    """
    return 2 * nbytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def box(part: Part, shape: tuple[int, ...]) -> Part:
    """Return `part` of an array of `shape` with a slice for each axis, all within the array.

    Raises:
      ValueError: it has slices of more axes than the array, or with another step than 1.
    """
    if len(part) > len(shape) or any(one.step not in (None, 1) for one in part):
        raise ValueError(f"part: expected slices with step 1 of some of {len(shape)} axes: {part}")
    whole = (*part, *(slice(None),) * (len(shape) - len(part)))
    bounds = [one.indices(size)[:2] for one, size in zip(whole, shape, strict=True)]
    return tuple(slice(first, max(first, stop)) for first, stop in bounds)


def box_shape(part: Part) -> tuple[int, ...]:
    """Return the shape of a part that `box` returned."""
    return tuple(one.stop - one.start for one in part)


def shift(within: Part, part: Part) -> Part:
    """Return a part of a part, both as `box` returns them, as a part of the whole array."""
    return tuple(
        slice(outer.start + inner.start, outer.start + inner.stop)
        for inner, outer in zip(within, part, strict=True)
    )


@dataclass(frozen=True)
class _Piece:
    """What one thread reads at once.

    Attributes:
      start: offset in the file.
      target: where it goes to.
      shape: of what is stored there.
      cut: which part of that is wanted.
    """

    start: int
    target: np.ndarray
    shape: tuple[int, ...]
    cut: Part


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, in C order and little endian.

    Attributes:
      file: the file.
      name: of the tensor, for messages.
      start: where it begins in the file.
      dtype: of its elements.
      shape: of the array.
      keep_cached: whether what has been read is left in the page cache; see `fits_page_cache`.
    """

    file: Path
    name: str
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    keep_cached: bool = True

    def read(self, part: Part = ()) -> np.ndarray:
        """Return `part` of the array, by default all of it.

        Apart from the result no more than a few pieces of 4 MiB are in memory.

        Returns:
          A new array, aligned to 64 bytes.

        Raises:
          CheckpointError: the file cannot be read, or has become shorter.
          ValueError: `part` is no part of the array.
        """
        part = box(part, self.shape)
        array = aligned_empty(box_shape(part), self.dtype, self.start)
        if array.size == 0:
            return array
        try:
            with ExitStack() as stack:
                descriptors = [os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)]
                stack.callback(os.close, descriptors[0])
                if not self.keep_cached and (direct := _open_direct(self.file)) is not None:
                    stack.callback(os.close, direct)
                    descriptors.append(direct)
                    # What is left are bits of blocks: reading on behind them would be in vain.
                    os.posix_fadvise(descriptors[0], 0, 0, os.POSIX_FADV_RANDOM)
                self._fill(array, part, descriptors)
        except OSError as error:
            raise CheckpointError(
                self.file, f"tensor {self.name!r}: cannot be read: {error.strerror or error}"
            ) from error
        return array

    def _fill(self, array: np.ndarray, part: Part, descriptors: Sequence[int]) -> None:
        def read(piece: _Piece) -> None:
            if box_shape(piece.cut) == piece.shape:
                self._read_bytes(descriptors, piece.start, piece.target)
                return
            stored = np.empty(piece.shape, self.dtype)
            self._read_bytes(descriptors[:1], piece.start, stored)
            piece.target[...] = stored[piece.cut]

        if array.nbytes <= _CHUNK_BYTES:
            for piece in self._pieces(array, part):
                read(piece)
            return
        with ThreadPoolExecutor(_THREADS) as threads:
            for _ in threads.map(read, self._pieces(array, part)):
                pass

    def _pieces(self, array: np.ndarray, part: Part) -> Iterator[_Piece]:
        """Yield the pieces that make up `array`, which is `part` of this one."""
        if not self.shape:
            yield _Piece(self.start, array, (), ())
            return
        axis = self._run_axis(part)
        shape, row_bytes = self.shape[axis + 1 :], self._row_bytes(axis)
        rows = max(1, _CHUNK_BYTES // row_bytes)
        first, stop = part[axis].start, part[axis].stop
        outer = [range(one.start, one.stop) for one in part[:axis]]
        for place, target in zip(
            itertools.product(*outer), array.reshape(-1, *array.shape[axis:]), strict=True
        ):
            index = _ravel(place, self.shape) * self.shape[axis]
            for row in range(first, stop, rows):
                count = min(rows, stop - row)
                yield _Piece(
                    self.start + (index + row) * row_bytes,
                    target[row - first : row - first + count],
                    (count, *shape),
                    (slice(0, count), *part[axis + 1 :]),
                )

    def _run_axis(self, part: Part) -> int:
        """Return the axis along which neighbouring rows are read at once.

        Of the axes after the last one that `part` does not have all of, a run has all. Runs along
        an axis before that are fewer and longer: more is read, and then cut off.
        """
        shape = box_shape(part)
        partial = [axis for axis, size in enumerate(shape) if size < self.shape[axis]]
        first = next(a for a in range(len(shape)) if self._row_bytes(a) <= _CHUNK_BYTES)

        def cost(axis: int) -> int:
            runs, run_bytes = math.prod(shape[:axis]), shape[axis] * self._row_bytes(axis)
            return runs * (run_bytes + _READ_COST)

        return min(range(first, max([first, *partial]) + 1), key=cost)

    def _row_bytes(self, axis: int) -> int:
        return math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize

    def _read_bytes(self, descriptors: Sequence[int], start: int, target: np.ndarray) -> None:
        """Read into `target`; a second descriptor is one that reads whole blocks directly."""
        buffered, *direct = descriptors
        buffer = target.reshape(-1).view(np.uint8).data
        head = -start % _BLOCK_BYTES
        stop = len(buffer) - (start + len(buffer)) % _BLOCK_BYTES
        done = _read_blocks(direct[0], start + head, buffer[head:stop]) if direct else 0
        if done:
            self._read_cached(buffered, start, buffer[:head])
            self._read_cached(buffered, start + head + done, buffer[head + done :])
        else:
            self._read_cached(buffered, start, buffer)

    def _read_cached(self, descriptor: int, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if not count:
                raise CheckpointError(
                    self.file, f"tensor {self.name!r}: the file ends inside its data"
                )
            done += count
        if done and not self.keep_cached:
            os.posix_fadvise(descriptor, start, done, os.POSIX_FADV_DONTNEED)


def _open_direct(file: Path) -> int | None:
    """Open `file` for reading past the page cache; None where its file system cannot do that."""
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _read_blocks(descriptor: int, start: int, buffer: memoryview) -> int:
    """Read whole blocks directly; returns of how many bytes that was possible."""
    done = 0
    while done < len(buffer) and done % _BLOCK_BYTES == 0:
        try:
            count = os.preadv(descriptor, [buffer[done:]], start + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break
        if not count:
            break
        done += count
    return done


def _ravel(place: Sequence[int], shape: tuple[int, ...]) -> int:
    """Return the number of the row `place` in C order; `shape` may go on with further axes."""
    number = 0
    for index, size in zip(place, shape, strict=False):
        number = number * size + index
    return number

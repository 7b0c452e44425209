"""The header of a GGUF file: metadata and the place of every tensor, checked before it is trusted.

Format: ggml-org/ggml `docs/gguf.md`, versions 2 and 3, little endian. Every count and length is
compared with the bytes that are left before anything is allocated for it. The `gguf` package
supplies the type numbers and block sizes; its own reader is not used, because it believes what a
file says, and because it makes several NumPy arrays for each of the 650,000 strings of a GPT-OSS
vocabulary, which takes half a minute and a gigabyte.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.reader import require_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
# Far above any real file; they keep a hostile one from costing minutes and gigabytes.
_MAX_TENSORS = 2**16
_MAX_KEYS = 2**16
_MAX_STRINGS = 2**22
# The header of the released models has 50 MB, nearly all of it vocabulary.
_MAX_HEADER_BYTES = 2**28
_MAX_NAME_BYTES = 2**16 - 1
# Key length, type, and the smallest value; name length, dimensions, one of them, type, offset.
_SMALLEST_KEY = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
      name: its name in the file.
      type: its element type.
      shape: logical shape, slowest axis first: the reverse of the order in the file.
      start: offset of its first byte from the start of the file.
      nbytes: the size of its data.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself.

    Attributes:
      metadata: Python numbers, booleans and strings; NumPy arrays of numbers; lists of strings,
        where bytes that are not UTF-8 are surrogate escapes.
      tensors: every tensor by name, in the order of the file.
      duplicates: a sentence for each further tensor with the name of one of `tensors`.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    duplicates: list[str]


def read_header(file: Path) -> GgufHeader:
    """Read and check the header of `file`.

    Raises:
      CheckpointError: the file cannot be read, is no GGUF file of a supported version, is
        truncated, or contradicts itself; all that is wrong with the tensors is listed at once.
        Names that occur twice are no error by themselves.
    """
    size = require_file(file)
    try:
        with file.open("rb") as handle:
            return _parse(_Cursor(handle, size, file))
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from error


class _Cursor:
    """Reads values one after the other and never beyond the end."""

    def __init__(self, handle: BinaryIO, size: int, file: Path) -> None:
        self.handle = handle
        self.size = size
        self.file = file
        self.offset = 0
        self.strings = 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(self.file, problem)

    def take(self, count: int, what: str) -> bytes:
        """Return the next `count` bytes."""
        if count > self.size - self.offset:
            raise self.error(
                f"truncated or damaged header: {what} at byte {self.offset} needs {count} bytes, "
                f"the file has {self.size - self.offset} more"
            )
        self.offset += count
        if self.offset > _MAX_HEADER_BYTES:
            raise self.error(
                f"expected a header of at most {_MAX_HEADER_BYTES} bytes, but {what} ends at byte "
                f"{self.offset}"
            )
        data = self.handle.read(count)
        if len(data) < count:
            raise self.error(f"has become shorter: it ends inside {what}")
        return data

    def number(self, code: str, what: str) -> Any:
        layout = f"<{code}"
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def text(self, what: str, limit: int | None = None, errors: str = "strict") -> str:
        length = self.number("Q", f"the length of {what}")
        if limit is not None and length > limit:
            raise self.error(f"{what}: expected at most {limit} bytes, found {length}")
        try:
            return self.take(length, what).decode(errors=errors)
        except UnicodeDecodeError as error:
            raise self.error(f"{what}: expected UTF-8, found {error.object[:64]!r}") from error

    def count(self, what: str, limit: int, smallest: int) -> int:
        """Read how many things follow, each of at least `smallest` bytes."""
        count = self.number("Q", f"the number of {what}")
        if count > limit or count * smallest > self.size - self.offset:
            raise self.error(
                f"expected at most {limit} {what} and no more than the file has room for, "
                f"found {count} in a file of {self.size} bytes"
            )
        return count


def _parse(cursor: _Cursor) -> GgufHeader:
    if cursor.size < len(_MAGIC) or cursor.take(len(_MAGIC), "the magic") != _MAGIC:
        raise cursor.error("expected a GGUF file, found another format")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        swapped = version and version & 0xFFFF == 0
        found = "a big-endian file" if swapped else f"version {version}"
        raise cursor.error(f"expected GGUF version 2 or 3, little endian, found {found}")
    tensor_count = cursor.count("tensors", _MAX_TENSORS, _SMALLEST_TENSOR)
    key_count = cursor.count("metadata keys", _MAX_KEYS, _SMALLEST_KEY)
    metadata: dict[str, Any] = {}
    for index in range(key_count):
        key = cursor.text(f"the name of metadata key {index}", _MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.error(f"metadata key {key!r}: occurs twice")
        metadata[key] = _value(cursor, f"metadata key {key!r}")
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(
            f"metadata key 'general.alignment': expected a power of two, found {alignment!r}"
        )
    infos = [_tensor_info(cursor, index) for index in range(tensor_count)]
    data_start = -(-cursor.offset // alignment) * alignment
    return GgufHeader(metadata, *_place(cursor, infos, data_start, alignment))


def _value(cursor: _Cursor, what: str) -> Any:
    kind = _kind(cursor, what)
    if kind is GGUFValueType.ARRAY:
        return _array(cursor, what)
    if kind is GGUFValueType.STRING:
        return cursor.text(what)
    return cursor.number(_SCALARS[kind], what)


def _kind(cursor: _Cursor, what: str) -> GGUFValueType:
    number = cursor.number("I", f"the type of {what}")
    try:
        return GGUFValueType(number)
    except ValueError as error:
        raise cursor.error(f"{what}: unknown value type {number}") from error


def _array(cursor: _Cursor, what: str) -> np.ndarray | list[str]:
    kind = _kind(cursor, what)
    if kind is GGUFValueType.ARRAY:
        raise cursor.error(f"{what}: arrays of arrays are not supported")
    if kind is GGUFValueType.STRING:
        count = cursor.count(f"strings in {what}", _MAX_STRINGS - cursor.strings, 8)
        cursor.strings += count
        return [cursor.text(what, errors="surrogateescape") for _ in range(count)]
    dtype = np.dtype(f"<{_SCALARS[kind]}")
    count = cursor.count(f"numbers in {what}", cursor.size, dtype.itemsize)
    return np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype)


def _tensor_info(cursor: _Cursor, index: int) -> tuple[str, int, tuple[int, ...], int]:
    """Return name, type number, shape and offset, as the file has them."""
    name = cursor.text(f"the name of tensor {index}", _MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    rank = cursor.number("I", what)
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise cursor.error(f"{what}: expected 1 to {_MAX_DIMENSIONS} dimensions, found {rank}")
    shape = tuple(cursor.number("Q", what) for _ in range(rank))[::-1]
    return name, cursor.number("I", what), shape, cursor.number("Q", what)


def _place(
    cursor: _Cursor,
    infos: list[tuple[str, int, tuple[int, ...], int]],
    data_start: int,
    alignment: int,
) -> tuple[dict[str, GgufTensor], list[str]]:
    """Return the tensors by name, and which are there twice.

    Each is checked by itself and all against each other.
    """
    problems: list[str] = []
    duplicates: list[str] = []
    tensors: dict[str, GgufTensor] = {}
    place = partial(_place_one, data_start=data_start, alignment=alignment, size=cursor.size)
    for name, number, shape, offset in infos:
        report: Callable[[str], None] = partial(_report, problems, name)
        tensor = place(name, number, shape, offset, report)
        if name in tensors:
            _report(duplicates, name, "occurs twice")
        elif tensor is not None:
            tensors[name] = tensor
    last = None
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if last is not None and last.start + last.nbytes > tensor.start:
            problems.append(f"tensor {tensor.name!r}: overlaps tensor {last.name!r}")
        if last is None or tensor.start + tensor.nbytes > last.start + last.nbytes:
            last = tensor
    if problems:
        raise CheckpointError(cursor.file, problems + duplicates)
    return tensors, duplicates


def _report(problems: list[str], name: str, problem: str) -> None:
    problems.append(f"tensor {name!r}: {problem}")


def _place_one(
    name: str,
    number: int,
    shape: tuple[int, ...],
    offset: int,
    report: Callable[[str], None],
    *,
    data_start: int,
    alignment: int,
    size: int,
) -> GgufTensor | None:
    """Return the tensor, or None after reporting what is wrong with it."""
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        report(f"unknown element type {number}")
        return None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        report(f"expected rows of a multiple of {block} elements in {kind.name}, found "
               f"shape {list(shape)}")  # fmt: skip
        return None
    nbytes = math.prod(shape) // block * block_bytes
    start = data_start + offset
    if offset % alignment:
        report(f"expected an offset that is a multiple of {alignment}, found {offset}")
    elif start + nbytes > size:
        report(f"expected {nbytes} bytes from byte {start} on, but the file has {size} bytes")
    else:
        return GgufTensor(name, kind, shape, start, nbytes)
    return None

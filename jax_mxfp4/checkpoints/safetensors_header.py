"""The header of a safetensors file: names, types and places, checked before they are trusted.

Format: huggingface/safetensors README: eight bytes of length, little endian, then a JSON object,
then the data without holes. The `safetensors` package is not used to read it: it takes the last of
two tensors of one name, and most of its errors do not say which tensor they are about.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from jax_mxfp4.checkpoints.errors import CheckpointError, shorten
from jax_mxfp4.checkpoints.reader import TensorInfo, load_json, require_file

# The header of 20,000 tensors has 2 MB; Python needs up to 30 times a header's size to parse it.
MAX_HEADER_BYTES = 2**24
"""Size of the largest header that is read; the format allows 100 MB."""

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one element of each type that the format has."""

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
# Sizes and offsets stay within what files and NumPy count with.
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says about itself.

    Attributes:
      file: the file.
      tensors: every tensor by name, in the order of the file.
      starts: where the data of each begins, in bytes from the start of the file.
      duplicates: a sentence for each name that occurs twice, of which the last is known here.
    """

    file: Path
    tensors: dict[str, TensorInfo]
    starts: dict[str, int]
    duplicates: list[str]


def read_header(file: Path) -> SafetensorsHeader:
    """Read and check the header of `file`.

    Raises:
      CheckpointError: the file cannot be read, is truncated or no safetensors file, or contradicts
        itself; all that is wrong with the tensors is listed at once. Names that occur twice are no
        error by themselves.
    """
    size = require_file(file)
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            limit = min(size - _LENGTH_BYTES, MAX_HEADER_BYTES)
            if not 0 < length <= limit:
                raise CheckpointError(
                    file,
                    "truncated or damaged safetensors file: expected the length of a header of at "
                    f"most {max(limit, 0)} bytes, found {length} in a file of {size} bytes",
                )
            text = handle.read(length)
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from error
    entries, twice = _parse(file, text)
    duplicates = [f"{name!r} occurs twice in the header" for name in twice]
    problems: list[str] = []
    data_start = _LENGTH_BYTES + length
    tensors: dict[str, TensorInfo] = {}
    starts: dict[str, int] = {}
    for name, entry in entries.items():
        if name == _METADATA:
            continue
        problem = _check_entry(entry, size - data_start)
        if problem:
            problems.append(f"tensor {name!r}: {problem}")
            continue
        begin, end = entry["data_offsets"]
        tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), end - begin, file)
        starts[name] = data_start + begin
    # What the first of two with one name covers is not known, and would seem to be unused.
    if not problems and not duplicates:
        problems = _check_cover(tensors, starts, data_start, size)
    if problems:
        raise CheckpointError(file, duplicates + problems)
    return SafetensorsHeader(file, tensors, starts, duplicates)


def _parse(file: Path, text: bytes) -> tuple[dict[str, Any], list[str]]:
    """Return the entries of the header, and the names that more than one of them has."""
    try:
        value, duplicates = load_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            file, f"truncated or damaged safetensors file: the header is not valid JSON: {error}"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            file,
            "truncated or damaged safetensors file: expected a JSON object as header, found "
            + type(value).__name__,
        )
    return value, duplicates


def _check_entry(entry: Any, data_bytes: int) -> str | None:
    """Return what is wrong with one tensor by itself."""
    if not isinstance(entry, Mapping):
        return f"expected a JSON object, found {type(entry).__name__}"
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"unknown element type {shorten(dtype)}"
    if not _are_sizes(shape):
        return f"expected a shape of whole numbers, found {shorten(shape)}"
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        return f"expected two offsets, the end not before the start, found {shorten(offsets)}"
    if offsets[1] > data_bytes:
        return (
            f"truncated or damaged: expected at least {offsets[1]} bytes of data, "
            f"the file has {data_bytes}"
        )
    # Without the axes of size 0: they must not hide others that nothing can count.
    bits = math.prod(size for size in shape if size) * BITS[dtype]
    if bits > _INT64_MAX:
        return f"the shape {shorten(shape)} is too large"
    expected = 0 if 0 in shape else bits
    if expected != 8 * (offsets[1] - offsets[0]):
        return (
            f"{dtype} {list(shape)} needs {expected / 8:g} bytes, found offsets for "
            f"{offsets[1] - offsets[0]}"
        )
    return None


def _check_cover(
    tensors: Mapping[str, TensorInfo], starts: Mapping[str, int], data_start: int, size: int
) -> list[str]:
    """Return where tensors overlap or leave bytes that belong to none."""
    problems = []
    end, before = data_start, "the header"
    for name in sorted(tensors, key=lambda name: (starts[name], tensors[name].nbytes)):
        start = starts[name]
        if start < end:
            problems.append(f"tensor {name!r}: overlaps {before}")
        elif start > end:
            problems.append(f"tensor {name!r}: {start - end} unused bytes after {before}")
        if start + tensors[name].nbytes >= end:
            end, before = start + tensors[name].nbytes, f"tensor {name!r}"
    if not problems and end != size:
        problems.append(f"{size - end} unused bytes after {before}, at the end of the file")
    return problems


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size <= _INT64_MAX for size in value
    )

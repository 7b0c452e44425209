"""Reader of GGUF files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.gguf_header import GgufHeader, GgufTensor, read_header
from jax_mxfp4.checkpoints.reader import TensorInfo

_DTYPES = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufFile:
    """The tensors of a GGUF file, or of all files of a split one.

    Opening reads and checks the headers; `read` reads one tensor, or some of its rows, from disk.
    A split file (`-00001-of-00003.gguf`) is opened by the name of its first part.

    Raises:
      CheckpointError: a file is missing, damaged or truncated, or the parts do not fit together.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file `path`."""
        self._path = Path(path)
        header = read_header(self._path)
        self._metadata = header.metadata
        self._tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, GgufTensor] = {}
        problems = self._add(self._path, header)
        for part in _further_parts(self._path, header.metadata):
            problems += self._add(part, read_header(part))
        if problems:
            raise CheckpointError(self._path, problems)

    def _add(self, file: Path, header: GgufHeader) -> list[str]:
        problems = []
        for name, tensor in header.tensors.items():
            if name in self._tensors:
                other = self._tensors[name].file.name
                problems.append(f"{file.name}: tensor {name!r} is also in {other}")
                continue
            self._places[name] = tensor
            self._tensors[name] = TensorInfo(
                name, tensor.type.name, tensor.shape, tensor.nbytes, file
            )
        return problems

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the (first) file; see `GgufHeader`."""
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name; shapes are logical ones, [out, in] for a matrix."""
        return self._tensors

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return tensor `name`, or only `rows` of its first axis, in its stored element type.

        Args:
          name: a key of `tensors`.
          rows: a slice of the first axis with step 1; None for the whole tensor.

        Returns:
          Plain types as they are, [...]; block types as bytes, uint8
          [..., K / block size, bytes of a block].

        Raises:
          CheckpointError: the file cannot be read, or has become shorter since it was opened.
        """
        tensor, file = self._places[name], self._tensors[name].file
        first, stop, _ = (rows or slice(None)).indices(tensor.shape[0])
        dtype = _DTYPES.get(tensor.type.name)
        shape = tensor.shape[1:]
        if dtype is None:
            block, block_bytes = GGML_QUANT_SIZES[tensor.type]
            dtype = np.dtype(np.uint8)
            if shape:
                shape = (*shape[:-1], shape[-1] // block, block_bytes)
            else:  # the blocks run along the only axis
                first, stop, shape = first // block, stop // block, (block_bytes,)
        array = np.empty((max(stop - first, 0), *shape), dtype)
        row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        _fill(array, file, tensor.start + first * row_bytes, name)
        return array


def _fill(array: np.ndarray, file: Path, start: int, name: str) -> None:
    buffer = array.reshape(-1).view(np.uint8).data
    try:
        with file.open("rb", buffering=0) as handle:
            handle.seek(start)
            done = 0
            while done < len(buffer):
                count = handle.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(file, f"tensor {name!r}: the file ends inside its data")
                done += count
    except OSError as error:
        raise CheckpointError(
            file, f"tensor {name!r}: cannot be read: {error.strerror or error}"
        ) from error


def _further_parts(file: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """Return the other files of a split one, in order; they are checked to exist."""
    count = metadata.get("split.count", 1)
    if type(count) is not int or count < 2:
        return []
    match = _SHARD.fullmatch(file.name)
    if not match or int(match["number"]) != 1 or int(match["count"]) != count:
        raise CheckpointError(
            file,
            f"expected the first part of a file split into {count}, "
            f"with a name that ends in -00001-of-{count:05}.gguf",
        )
    parts = [
        file.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf")
        for number in range(2, count + 1)
    ]
    missing = [f"{part.name}: missing file" for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(file, missing)
    return parts

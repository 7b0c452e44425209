"""Reader of GGUF files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.gguf_header import GgufHeader, GgufTensor, read_header
from jax_mxfp4.checkpoints.reader import TensorInfo
from jax_mxfp4.checkpoints.stored_array import StoredArray, fits_page_cache

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

    def __init__(self, path: str | Path, *, strict: bool = True) -> None:
        """Open the file `path`; for `strict` see `open_checkpoint`."""
        self._path = Path(path)
        header = read_header(self._path)
        self._metadata = header.metadata
        self._tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, GgufTensor] = {}
        problems = self._add(self._path, header)
        for part in _further_parts(self._path, header.metadata):
            problems += self._add(part, read_header(part))
        if strict and problems:
            raise CheckpointError(self._path, problems)
        self._problems = tuple(problems)
        self._keep_cached = fits_page_cache(sum(info.nbytes for info in self._tensors.values()))

    def _add(self, file: Path, header: GgufHeader) -> list[str]:
        """Add the tensors of a file; return which of them are there twice."""
        problems = [f"{file.name}: {duplicate}" for duplicate in header.duplicates]
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

    @property
    def problems(self) -> Sequence[str]:
        """Which tensors are there twice; none if strict."""
        return self._problems

    def stored(self, name: str) -> StoredArray:
        """Return where tensor `name` lies.

        Plain types are arrays [...] as they are; block types are bytes, uint8
        [..., K / block size, bytes of a block].
        """
        tensor, file = self._places[name], self._tensors[name].file
        dtype, shape = _DTYPES.get(tensor.type.name), tensor.shape
        if dtype is None:
            block, block_bytes = GGML_QUANT_SIZES[tensor.type]
            dtype, shape = np.dtype(np.uint8), (*shape[:-1], shape[-1] // block, block_bytes)
        return StoredArray(file, name, tensor.start, dtype, shape, self._keep_cached)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return tensor `name`, or only `rows` of its first axis, as `stored` describes it.

        Args:
          name: a key of `tensors`.
          rows: a slice of the first axis with step 1; None for the whole tensor.

        Raises:
          CheckpointError: the file cannot be read, or has become shorter since it was opened.
        """
        stored = self.stored(name)
        if rows is None:
            return stored.read()
        size = self._tensors[name].shape[0]
        first, stop, _ = rows.indices(size)
        # The blocks of a tensor with one axis run along that.
        per_row = size // stored.shape[0]
        return stored.read((slice(first // per_row, stop // per_row),))


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

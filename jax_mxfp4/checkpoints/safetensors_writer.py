"""Writing a folder of safetensors files tensor by tensor, or rows of them, in any order."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from jax_mxfp4.checkpoints.safetensors_header import BITS

# Five billion bytes, as transformers splits.
MAX_SHARD_BYTES = 5 * 10**9

ITEM_BYTES = {name: bits // 8 for name, bits in BITS.items() if bits % 8 == 0}
"""Size of one element of each type that can be written."""

_LENGTH_BYTES = 8
# Of the first tensor, and so of most, whose sizes are multiples of it: readers can then let a disk
# write to where an array stays. The format asks for 8.
_ALIGNMENT = 64


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be written: safetensors' name of its element type, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class SafetensorsWriter:
    """Writes `tensors` to `folder`: one file, or several of at most `max_shard_bytes` and an index.

    Use it as a context manager; in it every tensor must be written, whole or by rows. Nothing but
    the array that is being written is held in memory. Format: huggingface/safetensors README.

    Attributes:
      file_of: the file that holds each tensor.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, NewTensor], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Lay out the files; they are created when the context is entered."""
        self._folder = folder
        self._tensors = dict(tensors)
        self._shards = _split(self._tensors, max_shard_bytes)
        self._files: dict[str, BinaryIO] = {}
        self._starts: dict[str, int] = {}
        self.file_of: dict[str, str] = {}

    def __enter__(self) -> "SafetensorsWriter":
        """Create the files with their headers and the index."""
        count = len(self._shards)
        for number, names in enumerate(self._shards, 1):
            file = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else _ONLY_FILE
            self._files[file] = handle = (self._folder / file).open("wb")
            self.file_of |= dict.fromkeys(names, file)
            handle.write(self._header(names))
        if count > 1:
            total = sum(tensor.nbytes for tensor in self._tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": self.file_of}
            file = self._folder / "model.safetensors.index.json"
            file.write_text(json.dumps(index, indent=2) + "\n")
        return self

    def write(self, name: str, array: np.ndarray, first_row: int = 0) -> None:
        """Write `array` as the rows of tensor `name` from `first_row` on.

        Raises:
          ValueError: `array` is of another element size, or does not fit in.
        """
        tensor = self._tensors[name]
        total, rows = (shape[0] if shape else 1 for shape in (tensor.shape, array.shape))
        row_bytes = tensor.nbytes // max(total, 1)
        if array.nbytes != row_bytes * rows or first_row + rows > total:
            raise ValueError(
                f"tensor {name!r}: {array.dtype} {list(array.shape)} at row {first_row} does not "
                f"fit in {tensor.dtype} {list(tensor.shape)}"
            )
        file = self._files[self.file_of[name]]
        file.seek(self._starts[name] + first_row * row_bytes)
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the files, after they have reached the disk unless there was an error."""
        for file in self._files.values():
            with file:
                if error is None:
                    file.flush()
                    os.fsync(file.fileno())

    def _header(self, names: list[str]) -> bytes:
        """Return the header of one file and note where its tensors start."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        end = 0
        for name in names:
            tensor = self._tensors[name]
            offsets[name] = end
            end += tensor.nbytes
            entries[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": (offsets[name], end),
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
        header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        self._starts |= {name: len(header) + offset for name, offset in offsets.items()}
        return header


_ONLY_FILE = "model.safetensors"


def _split(tensors: Mapping[str, NewTensor], max_bytes: int) -> list[list[str]]:
    """Return the names that each file holds, in the order of `tensors` from file to file.

    Within a file the widest element types come first, which keeps all data aligned.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return [
        sorted(names, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name)) for names in shards
    ]

"""What every checkpoint reader offers, whatever the file format."""

import json
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.stored_array import Part, StoredArray

# Far above any configuration or index; Python needs up to 30 times as much to parse it.
MAX_JSON_BYTES = 2**24


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, known from a header without reading its data.

    Attributes:
      name: the tensor's name in the file.
      dtype: the file format's own name for the element type, such as `BF16` or `U8`.
      shape: the stored shape.
      nbytes: the size of the tensor's data in the file.
      file: the file that holds it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


class Reader(Protocol):
    """Gives access to the tensors of a checkpoint, one at a time."""

    @property
    def path(self) -> Path:
        """The folder or file that was opened."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by name."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """What is wrong although every one of `tensors` can be read; see `open_checkpoint`."""
        ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return tensor `name`, or only `rows` of its first axis, in its stored element type."""
        ...


@runtime_checkable
class FileReader(Reader, Protocol):
    """A reader whose tensors lie in files as they are read."""

    def stored(self, name: str) -> StoredArray:
        """Return where tensor `name` lies."""
        ...


def read_part(reader: Reader, name: str, part: Part) -> np.ndarray:
    """Return a part of tensor `name`; a reader that makes its tensors up makes whole rows."""
    if isinstance(reader, FileReader):
        return reader.stored(name).read(part)
    rows = reader.read(name, *part[:1])
    return rows[(slice(None), *part[1:])] if len(part) > 1 else rows


def require_folder(path: Path) -> None:
    """Refuse a path that is no folder.

    Raises:
      CheckpointError: `path` does not exist or is a file.
    """
    if not path.is_dir():
        found = "found a file" if path.exists() else "no such folder"
        raise CheckpointError(path, f"expected a checkpoint folder: {found}")


def require_file(file: Path) -> int:
    """Return the size of `file`; refuse what cannot be read like a file.

    Opening a pipe waits for ever, and a device has no end; a link that leads to a file is one.

    Raises:
      CheckpointError: there is no such file, or it is a folder, a pipe or a device.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise CheckpointError(file, f"cannot be read: expected a file, found {found}")
    return status.st_size


def read_small_file(file: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of `file`.

    Raises:
      CheckpointError: the file cannot be read, or has more than `limit` bytes.
    """
    size = require_file(file)
    if size > limit:
        raise CheckpointError(file, f"expected at most {limit} bytes, found {size}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from error


def read_json_object(file: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in `file`.

    Raises:
      CheckpointError: the file cannot be read, has more than `limit` bytes, is not valid JSON, is
        not an object, or an object in it has a key twice.
    """
    content = read_small_file(file, limit)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(file, f"is not valid JSON: {error}") from error
    return parse_json_object(file, text)


def parse_json_object(file: Path, text: Any, what: str = "") -> dict[str, Any]:
    """Return the JSON object in `text`, which is `what` of `file` (by default all of it).

    Raises:
      CheckpointError: `text` is no string, not valid JSON, not an object, or an object in it has a
        key twice.
    """
    where = f"{what}: " if what else ""
    try:
        value, duplicates = load_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(file, f"{where}is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(file, f"{where}expected a JSON object, found {type(value).__name__}")
    if duplicates:
        raise CheckpointError(file, [f"{where}{name!r}: occurs twice" for name in duplicates])
    return value


def load_json(text: str | bytes) -> tuple[Any, list[str]]:
    """Return the value of `text`, and every key that an object in it has twice.

    Raises:
      ValueError: `text` is not valid JSON.
      RecursionError: it is nested too deeply.
    """
    duplicates: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            duplicates.extend(key for key, count in counts.items() if count > 1)
        return value

    return json.loads(text, object_pairs_hook=collect), duplicates

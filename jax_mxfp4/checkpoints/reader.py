"""What every checkpoint reader offers, whatever the file format."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jax_mxfp4.checkpoints.errors import CheckpointError


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

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return tensor `name`, or only `rows` of its first axis, in its stored element type."""
        ...


def require_folder(path: Path) -> None:
    """Refuse a path that is no folder.

    Raises:
      CheckpointError: `path` does not exist or is a file.
    """
    if not path.is_dir():
        found = "found a file" if path.exists() else "no such folder"
        raise CheckpointError(path, f"expected a checkpoint folder: {found}")


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`.

    Raises:
      CheckpointError: the file cannot be read, is not valid JSON, or is not an object.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(file, f"is not valid JSON: {error}") from error
    return parse_json_object(file, text)


def parse_json_object(file: Path, text: Any, what: str = "") -> dict[str, Any]:
    """Return the JSON object in `text`, which is `what` of `file` (by default all of it).

    Raises:
      CheckpointError: `text` is no string, not valid JSON, or is not an object.
    """
    where = f"{what}: " if what else ""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(file, f"{where}is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(file, f"{where}expected a JSON object, found {type(value).__name__}")
    return value

"""A folder that keeps the layers that are done, so that a calibration can be resumed."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.block_layouts import canonical

_SETTINGS = "settings.json"


class LayerStore:
    """One file of packed weights for each finished layer, beside the settings that made them.

    A file appears under its name when it is complete, so that a killed run leaves only whole
    layers.

    Args:
      folder: made if it does not exist.
      settings: what the results depend on, as JSON values; a folder that was made with others is
        refused.

    Raises:
      ValueError: `folder` holds the layers of another calibration, or is no folder.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        """Open or make `folder`."""
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"checkpoint {folder}: expected a folder, found a file")
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / _SETTINGS
        wanted = json.loads(json.dumps(settings))
        if not file.exists():
            if any(self._folder.iterdir()):
                raise ValueError(f"checkpoint {folder}: expected a new or resumable folder")
            _write(file, json.dumps(wanted, indent=2).encode())
            return
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"checkpoint {file}: is not valid JSON: {error}") from error
        if found != wanted:
            keys = sorted({*found, *wanted})
            problems = [
                f"{key}: found {found.get(key)!r}, now {wanted.get(key)!r}"
                for key in keys
                if found.get(key) != wanted.get(key)
            ]
            raise ValueError(
                f"checkpoint {folder}: was made with other settings; {'; '.join(problems)}"
            )

    def load(self, layer: int) -> dict[str, MXFP4Array] | None:
        """Return the packed weights of `layer` by name, None where it is not done."""
        return load_layer(self._folder, layer) if _file(self._folder, layer).exists() else None

    def finished(self) -> list[dict[str, MXFP4Array]]:
        """Return the packed weights of the first layers, up to one that is not done."""
        layers = []
        while (weights := self.load(len(layers))) is not None:
            layers.append(weights)
        return layers

    def save(self, layer: int, weights: Mapping[str, MXFP4Array]) -> None:
        """Keep the packed weights of `layer`."""
        arrays = {}
        for name, weight in weights.items():
            weight = canonical(weight)
            arrays[f"{name}/blocks"] = np.asarray(weight.blocks)
            arrays[f"{name}/scales"] = np.asarray(weight.scales)
        temporary = self._folder / f".layer-{layer:05}.partial.npz"
        np.savez(temporary, **arrays)
        os.replace(temporary, _file(self._folder, layer))


def load_layer(folder: str | Path, layer: int) -> dict[str, MXFP4Array]:
    """Return the packed weights of a finished `layer` by name, as NumPy arrays."""
    with np.load(_file(Path(folder), layer)) as arrays:
        names = {name.rpartition("/")[0]: None for name in arrays.files}
        return {
            name: MXFP4Array(arrays[f"{name}/blocks"], arrays[f"{name}/scales"]) for name in names
        }


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05}.npz"


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, file)


def fingerprint(*arrays: Any) -> str:
    """Return a digest of the dtypes, shapes and bytes of `arrays`, the same on every machine."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

"""Reader of a folder of safetensors files: sharded with an index, sharded without, or one file."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import ml_dtypes
import numpy as np

from jax_mxfp4.checkpoints.errors import CheckpointError, shorten
from jax_mxfp4.checkpoints.reader import TensorInfo, read_json_object, require_folder
from jax_mxfp4.checkpoints.safetensors_header import SafetensorsHeader, read_header
from jax_mxfp4.checkpoints.stored_array import StoredArray, fits_page_cache

_LONGEST_FILE_NAME = 255  # bytes, in the file systems in use
_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<last>\d+)\.safetensors")
_DTYPES = {
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}


class SafetensorsFolder:
    """The tensors of all safetensors files of a folder.

    Opening reads and checks the headers; `read` reads one tensor, or some of its rows, from disk,
    and `stored` any part of one.

    With an index (`*.safetensors.index.json`) the files that it names are opened, and what they
    hold must agree with it. Without one, every `*.safetensors` file is opened; files that are
    numbered `-NNNNN-of-MMMMM` must then be complete, counted from 0 to M as the released GPT-OSS
    shards are, or from 1 to M.

    Raises:
      CheckpointError: everything that is wrong with the index and the files, at once.
    """

    def __init__(self, path: str | Path, *, strict: bool = True) -> None:
        """Open the folder `path`; for `strict` see `open_checkpoint`."""
        self._path = Path(path)
        require_folder(self._path)
        index_file, weight_map = _read_index(self._path)
        files = sorted(set(weight_map.values())) if index_file else _list_files(self._path)
        headers, damage = _read_headers(self._path, files)
        self._tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        problems: list[str] = []
        for header in headers:
            problems += self._add(header)
        # Without all the headers a comparison with the index would only repeat what is known.
        if index_file and not damage:
            problems += _compare_with_index(weight_map, self._tensors)
        if damage or (strict and problems):
            raise CheckpointError(index_file or self._path, damage + problems)
        self._problems = tuple(problems)
        self._keep_cached = fits_page_cache(sum(info.nbytes for info in self._tensors.values()))

    def _add(self, header: SafetensorsHeader) -> list[str]:
        """Add the tensors of a file; return which of them are there twice."""
        file = header.file.name
        problems = [f"{file}: {duplicate}" for duplicate in header.duplicates]
        for name, info in header.tensors.items():
            if name in self._tensors:
                other = self._tensors[name].file.name
                problems.append(f"{file}: tensor {name!r} is also in {other}")
                continue
            self._tensors[name] = info
            self._starts[name] = header.starts[name]
        return problems

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of every file by name."""
        return self._tensors

    @property
    def problems(self) -> Sequence[str]:
        """Which tensors are there twice, or elsewhere than the index says; none if strict."""
        return self._problems

    def stored(self, name: str) -> StoredArray:
        """Return where tensor `name` lies, of any element type that NumPy or ml_dtypes has.

        Raises:
          CheckpointError: there is no such element type.
        """
        info = self._tensors[name]
        dtype = _DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(info.file, f"tensor {name!r}: cannot be read as {info.dtype}")
        start = self._starts[name]
        return StoredArray(info.file, name, start, dtype, info.shape, self._keep_cached)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return tensor `name`, or only `rows` of its first axis, in its stored element type.

        Args:
          name: a key of `tensors`.
          rows: a slice of the first axis with step 1; None for the whole tensor.

        Raises:
          CheckpointError: as `stored`; or the file cannot be read, or has become shorter since it
            was opened.
        """
        return self.stored(name).read(() if rows is None else (rows,))


def _read_index(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the folder's index file and its tensor -> file map; (None, {}) without an index."""
    indices = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if not indices:
        return None, {}
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise CheckpointError(folder, f"expected one index file, found {names}")
    weight_map = read_json_object(indices[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            indices[0], "'weight_map': expected an object of tensor names to file names"
        )
    problems = [
        f"tensor {shorten(tensor)}: expected the name of a .safetensors file of this folder, "
        f"found {shorten(file)}"
        for tensor, file in weight_map.items()
        if not _is_plain_file_name(file)
    ]
    if problems:
        raise CheckpointError(indices[0], problems)
    return indices[0], weight_map


def _is_plain_file_name(name: object) -> bool:
    """Whether `name` can only denote a safetensors file inside the folder itself."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()
        and len(os.fsencode(name)) <= _LONGEST_FILE_NAME
        # Separators and drive letters of both kinds, so that an index is judged alike everywhere.
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )


def _list_files(folder: Path) -> list[str]:
    """Return the folder's safetensors file names and refuse an incomplete series of shards."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(folder, "expected *.safetensors files, found none")
    series: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            key = (match["stem"], match["last"])
            series.setdefault(key, set()).add(int(match["number"]))
    problems = []
    for (stem, last), numbers in series.items():
        first = 0 if 0 in numbers else 1
        # An absurd count must not become an absurd list.
        absent = [n for n in range(first, min(int(last), 10_000) + 1) if n not in numbers]
        problems += [
            f"{stem}-{number:0{len(last)}}-of-{last}.safetensors: missing file"
            for number in absent[:16]
        ]
        if len(absent) > 16:
            problems.append(f"{len(absent) - 16} further files of this series are missing")
    if problems:
        raise CheckpointError(folder, problems)
    return names


def _read_headers(folder: Path, files: list[str]) -> tuple[list[SafetensorsHeader], list[str]]:
    """Return the headers of `files` that can be read, and what is wrong with the others."""
    headers: list[SafetensorsHeader] = []
    problems: list[str] = []
    for name in files:
        file = folder / name
        if not file.exists():
            problems.append(f"{name}: missing file")
            continue
        try:
            headers.append(read_header(file))
        except CheckpointError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    return headers, problems


def _compare_with_index(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    """Return where the index and the files' own headers disagree."""
    problems = []
    for name, file in weight_map.items():
        found = tensors[name].file.name if name in tensors else "none of the files"
        if found != file:
            problems.append(f"tensor {name!r}: the index says {file}, found in {found}")
    problems += [
        f"tensor {name!r} of {info.file.name}: not in the index"
        for name, info in tensors.items()
        if name not in weight_map
    ]
    return problems

"""Reader of a folder of safetensors files: sharded with an index, sharded without, or one file."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

# Imported for its effect: it registers the name "bfloat16" with numpy, which safetensors looks up.
import ml_dtypes  # noqa: F401
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.reader import TensorInfo, read_json_object, require_folder

_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<last>\d+)\.safetensors")
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class SafetensorsFolder:
    """The tensors of all safetensors files of a folder, memory mapped.

    Opening reads the headers only; `read` copies one tensor (or some of its rows) out of the map.

    With an index (`*.safetensors.index.json`) the files that it names are opened, and what they
    hold must agree with it. Without one, every `*.safetensors` file is opened; files that are
    numbered `-NNNNN-of-MMMMM` must then be complete, counted from 0 to M as the released GPT-OSS
    shards are, or from 1 to M.

    Raises:
      CheckpointError: everything that is wrong with the index and the files, at once.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the folder `path`."""
        self._path = Path(path)
        require_folder(self._path)
        index_file, weight_map = _read_index(self._path)
        files = sorted(set(weight_map.values())) if index_file else _list_files(self._path)
        self._handles: dict[Path, safe_open] = {}
        self._tensors: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for name in files:
            problems += self._open(self._path / name)
        # Without all the headers a comparison with the index would only repeat what is known.
        if index_file and not problems:
            problems += _compare_with_index(weight_map, self._tensors)
        if problems:
            raise CheckpointError(index_file or self._path, problems)

    def _open(self, file: Path) -> list[str]:
        """Map `file` and add its tensors; return what is wrong with it."""
        try:
            handle = safe_open(file, framework="np")
        except SafetensorError as error:
            return [f"{file.name}: damaged or truncated safetensors file ({error})"]
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            return [f"{file.name}: {'missing file' if missing else f'cannot be read ({error})'}"]
        problems = []
        self._handles[file] = handle
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            header = handle.get_slice(name)
            shape, dtype = tuple(header.get_shape()), header.get_dtype()
            nbytes = int(np.prod(shape, dtype=object)) * _BITS[dtype] // 8
            if name in self._tensors:
                other = self._tensors[name].file.name
                problems.append(f"{file.name}: tensor {name!r} is also in {other}")
            else:
                self._tensors[name] = TensorInfo(name, dtype, shape, nbytes, file)
        return problems

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of every file by name."""
        return self._tensors

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return tensor `name`, or only `rows` of its first axis, in its stored element type.

        Args:
          name: a key of `tensors`, of any element type that numpy or ml_dtypes has.
          rows: a slice of the first axis; None for the whole tensor.
        """
        handle = self._handles[self._tensors[name].file]
        if rows is None:
            return handle.get_tensor(name)
        return handle.get_slice(name)[rows]


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
        f"tensor {tensor!r}: expected the name of a .safetensors file of this folder, "
        f"found {file!r}"
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

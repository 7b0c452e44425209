"""SHA-256 of checkpoint files: recording it, and comparing it with what has been recorded.

What is written here is the format of `sha256sum`, so that ``sha256sum -c SHA256SUMS`` checks it as
well: `SHA256SUMS` in a folder, with every file of it, and `NAME.sha256` beside a single file. Other
readers take no notice of either. Further places are known for files that were downloaded from the
Hugging Face Hub (package huggingface_hub): `.cache/huggingface/download/NAME.metadata` in the
folder, whose second line is the SHA-256 of large files, and the name of the blob that a file in the
Hub's cache is a link to.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jax_mxfp4.checkpoints.errors import CheckpointError, shorten
from jax_mxfp4.checkpoints.reader import MAX_JSON_BYTES, require_file

SUMS = "SHA256SUMS"
"""The file in a folder that has the checksums of the others."""

SUFFIX = ".sha256"
"""What the name of a single file gets for its checksum."""

# Of sha256sum, in text and in binary mode, or with --tag.
_LINE = re.compile(
    r"(?P<sum>[0-9a-fA-F]{64}) [ *](?P<name>.+)"
    r"|SHA256 \((?P<tagged>.+)\) = (?P<tag>[0-9a-fA-F]{64})"
)
_SUM = re.compile(r"[0-9a-f]{64}")
_LONGEST_PART, _MOST_PARTS = 255, 8
_BUFFER_BYTES = 2**22
_THREADS = 4


@dataclass(frozen=True)
class Checksum:
    """The checksum of one file.

    Attributes:
      file: the file.
      found: its SHA-256 in hexadecimal digits.
      recorded: where one is recorded -> what it says; empty if there is none.
    """

    file: Path
    found: str
    recorded: Mapping[str, str]

    @property
    def problems(self) -> list[str]:
        """What is wrong with it: one sentence for each record that differs."""
        return [
            f"{self.file.name}: expected SHA-256 {expected} as in {where}, found {self.found}"
            for where, expected in self.recorded.items()
            if expected != self.found
        ]


def record_checksums(path: Path) -> None:
    """Write the checksums of a folder to `SHA256SUMS` in it, or that of a file beside it.

    Raises:
      CheckpointError: a file cannot be read.
    """
    if path.is_dir():
        record, files = path / SUMS, [file for file in path.rglob("*") if file.is_file()]
        files = sorted(file for file in files if file != record)
    else:
        record, files = path.with_name(path.name + SUFFIX), [path]
    lines = [
        f"{digest}  {file.relative_to(record.parent).as_posix()}\n"
        for file, digest in zip(files, _sha256_of(files), strict=True)
    ]
    record.write_text("".join(lines))


def check_files(
    path: Path, weights: Iterable[Path], progress: Callable[[int], None] | None = None
) -> Iterator[Checksum]:
    """Read the files of a checkpoint and compare them with what is recorded of them.

    Args:
      path: the folder or file of the checkpoint.
      weights: its files with tensors, which are read also if nothing is recorded of them.
      progress: called with the number of bytes that have just been read.

    Raises:
      CheckpointError: a record is damaged or names files that are not there; all are listed.
    """
    recorded = _recorded(path, set(weights))
    files = sorted(recorded)
    for file, found in zip(files, _sha256_of(files, progress), strict=True):
        yield Checksum(file, found, recorded[file])


def _sha256(file: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of `file` in hexadecimal digits.

    Raises:
      CheckpointError: it cannot be read.
    """
    digest, buffer = hashlib.sha256(), bytearray(_BUFFER_BYTES)
    try:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                if progress is not None:
                    progress(count)
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _sha256_of(files: list[Path], progress: Callable[[int], None] | None = None) -> Iterator[str]:
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(lambda file: _sha256(file, progress), files)


def _recorded(path: Path, weights: set[Path]) -> dict[Path, dict[str, str]]:
    """Return every file of the checkpoint that there is a record of, or that has tensors."""
    found: dict[Path, dict[str, str]] = {file: {} for file in weights}
    problems: list[str] = []
    folder = path if path.is_dir() else path.parent
    if (folder / SUMS).exists():
        for name, digest in _read_sums(folder / SUMS, problems).items():
            # Beside a single file there may be anything.
            if path.is_dir() or folder / name in weights:
                found.setdefault(folder / name, {})[SUMS] = digest
    for file in sorted(found):
        side = file.with_name(file.name + SUFFIX)
        if side.exists():
            sums = _read_sums(side, problems)
            if file.name in sums:
                found[file][side.name] = sums[file.name]
            else:
                problems.append(f"{side.name}: expected the checksum of {file.name}")
        found[file] |= _recorded_by_hub(folder, file)
    problems += [
        f"{file.name}: missing file, listed in {' and '.join(records)}"
        for file, records in found.items()
        if not file.is_file()
    ]
    if problems:
        raise CheckpointError(path, problems)
    return found


def _read_sums(file: Path, problems: list[str]) -> dict[str, str]:
    """Return file name -> checksum; add what is wrong to `problems`."""
    size = require_file(file)
    if size > MAX_JSON_BYTES:
        problems.append(f"{file.name}: expected at most {MAX_JSON_BYTES} bytes, found {size}")
        return {}
    sums: dict[str, str] = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        name = match and (match["name"] or match["tagged"])
        if not match or not name or not _is_below(name):
            problems.append(
                f"{file.name}: line {number}: expected a SHA-256 and the name of a file in this "
                f"folder, found {shorten(line)}"
            )
            continue
        sums[name.removeprefix("./")] = (match["sum"] or match["tag"]).lower()
    return sums


def _is_below(name: str) -> bool:
    """Whether `name` can only denote something in the folder itself."""
    path = PurePosixPath(name)
    return (
        name.isprintable()
        # No file has a longer name; asking the system for one is an error of another kind.
        and all(len(os.fsencode(part)) <= _LONGEST_PART for part in path.parts)
        and len(path.parts) <= _MOST_PARTS
        and not path.is_absolute()
        and ".." not in path.parts
    )


def _recorded_by_hub(folder: Path, file: Path) -> dict[str, str]:
    found = {}
    metadata = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if metadata.is_file() and metadata.stat().st_size <= MAX_JSON_BYTES:
        lines = metadata.read_text(errors="replace").splitlines()
        # Of small files this is another kind of hash.
        if len(lines) > 1 and _SUM.fullmatch(lines[1]):
            found[metadata.name] = lines[1]
    blob = Path(os.path.realpath(file))
    if file.is_symlink() and blob.parent.name == "blobs" and _SUM.fullmatch(blob.name):
        found["the name of its blob"] = blob.name
    return found

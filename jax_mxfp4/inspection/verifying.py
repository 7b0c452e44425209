"""Checking one checkpoint against its configuration, its checksums, and what values may be."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import (
    CheckpointError,
    Parameters,
    Progress,
    WeightsFolder,
    open_checkpoint,
)
from jax_mxfp4.checkpoints.checksums import Checksum, check_files
from jax_mxfp4.checkpoints.logical_tensors import boxes
from jax_mxfp4.format import E8M0_NAN
from jax_mxfp4.inspection.llama_shapes import check_llama_shapes
from jax_mxfp4.inspection.opening import open_parameters

# Elements, or blocks, that are looked at together.
_CHUNK = 2**24


@dataclass(frozen=True)
class Verified:
    """What a checkpoint without faults holds.

    Attributes:
      tensors: how many are stored.
      parameters: how many elements they have.
      nbytes: their size in the files.
      checksums: of each file with tensors, and each that a checksum is recorded of.
      unchecked: what could not be checked, in a sentence; None if everything could.
    """

    tensors: int
    parameters: int
    nbytes: int
    checksums: tuple[Checksum, ...]
    unchecked: str | None = None


def verify(path: str | Path, progress: Progress | None = None) -> Verified:
    """Read all of the checkpoint `path` and check it.

    The structure of its files; names, shapes and types against its own configuration, of GPT-OSS
    and of models of the shape of Llama; that no scale is NaN and every value is finite; and the
    SHA-256 of its files, where they are recorded (see `jax_mxfp4.checkpoints.checksums`).

    Args:
      path: a folder, or a file `*.gguf`.
      progress: called with (what was read, bytes read so far, bytes to read); everything is read
        twice, once for the checksums.

    Raises:
      CheckpointError: its structure is damaged, tensors are missing, unexpected, misshapen, of a
        wrong type or there twice; or else, all at once, every parameter with NaN scales or values
        that are not finite, and every file that is not what was recorded.
    """
    reader = open_checkpoint(path, strict=False)
    parameters = open_parameters(path, reader)
    unchecked = None
    if isinstance(parameters, WeightsFolder):
        unchecked = check_llama_shapes(parameters)
    files = {info.file for info in reader.tensors.values()}
    total = sum(map(parameters.stored_bytes, parameters.specs))
    total += sum(file.stat().st_size for file in files)
    done = 0

    def report(what: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(what, done, max(done, total))

    problems = []
    elements = 0
    for name in parameters.specs:
        elements += _check_values(parameters, name, problems)
        report(name, parameters.stored_bytes(name))
    checksums = tuple(check_files(Path(path), files, lambda count: report("checksums", count)))
    problems += [problem for one in checksums for problem in one.problems]
    if problems:
        raise CheckpointError(path, problems)
    nbytes = sum(info.nbytes for info in reader.tensors.values())
    return Verified(len(reader.tensors), elements, nbytes, checksums, unchecked)


def _check_values(parameters: Parameters, name: str, problems: list[str]) -> int:
    """Return how many elements parameter `name` has; add what is wrong with them to `problems`."""
    elements = size = count = 0
    first: list[int] = []
    what = ""
    for part in boxes(parameters.specs[name].part_shape, _CHUNK):
        array = parameters.read(name, part)
        elements += array.size
        if isinstance(array, MXFP4Array):
            what, bad = "scales are NaN", array.scales == E8M0_NAN
        else:
            what, bad = "values are not finite", ~np.isfinite(array)
        size += bad.size
        found = int(np.count_nonzero(bad))
        if found and not count:
            at = np.unravel_index(int(np.argmax(bad)), bad.shape)
            starts = [one.start for one in part] + [0] * (bad.ndim - len(part))
            first = [int(index) + start for index, start in zip(at, starts, strict=True)]
        count += found
    if count:
        problems.append(f"{name!r}: {count} of {size} {what}, the first at {first}")
    return elements

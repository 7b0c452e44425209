"""Checking one GPT-OSS checkpoint, and comparing two."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import CheckpointError, Progress, open_checkpoint, read_parameters
from jax_mxfp4.format import E8M0_NAN, decode
from jax_mxfp4.models.gpt_oss.config_json import read_config
from jax_mxfp4.models.gpt_oss.params import parameter_specs

# Elements that are compared at a time, as float32 and float64.
_CHUNK = 2**22


@dataclass(frozen=True)
class Verified:
    """What a checkpoint without faults holds."""

    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Difference:
    """How one parameter differs between two checkpoints; values, not their representation.

    Attributes:
      name: canonical name.
      elements: how many values there are.
      different: how many of them are not equal; two NaN are.
      largest: the largest absolute error; NaN or infinite where a value is on one side only.
      relative: root of the mean square error over that of the first checkpoint's mean square.
    """

    name: str
    elements: int
    different: int
    largest: float
    relative: float


def verify(path: str | Path, progress: Progress | None = None) -> Verified:
    """Read all of the checkpoint `path` and check it against its own configuration.

    Args:
      path: a folder, or a file `*.gguf`.
      progress: see `read_parameters`.

    Raises:
      CheckpointError: its structure is damaged, tensors are missing, unexpected, misshapen or of a
        wrong type; or else, all at once, every parameter with NaN scales or values that are not
        finite.
    """
    config = read_config(path)
    reader = open_checkpoint(path)
    problems = []
    parameters = 0
    for name, parameter in read_parameters(reader, parameter_specs(config), progress):
        parameters += parameter.size
        if isinstance(parameter, MXFP4Array):
            what, bad = "scales are NaN", parameter.scales == E8M0_NAN
        else:
            what, bad = "values are not finite", ~np.isfinite(parameter)
        if count := int(np.count_nonzero(bad)):
            first = [int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape)]
            problems.append(f"{name!r}: {count} of {bad.size} {what}, the first at {first}")
    if problems:
        raise CheckpointError(path, problems)
    nbytes = sum(info.nbytes for info in reader.tensors.values())
    return Verified(len(reader.tensors), parameters, nbytes)


def diff(
    left: str | Path, right: str | Path, progress: Progress | None = None
) -> Iterator[Difference]:
    """Compare two checkpoints, of any layout, parameter by parameter.

    Args:
      left: a folder, or a file `*.gguf`; errors are relative to this one.
      right: the other.
      progress: see `read_parameters`; counts the bytes of `left`.

    Yields:
      A `Difference` for each parameter, also those that are equal.

    Raises:
      CheckpointError: one cannot be read, or the two are not of one shape.
    """
    specs, others = (parameter_specs(read_config(path)) for path in (left, right))
    problems = [
        f"{name!r}: {_shape(specs, name)} in {left}, {_shape(others, name)} in {right}"
        for name in specs | others
        if specs.get(name) != others.get(name)
    ]
    if problems:
        raise CheckpointError(right, problems)
    pairs = zip(
        read_parameters(open_checkpoint(left), specs, progress),
        read_parameters(open_checkpoint(right), specs),
        strict=True,
    )
    for (name, one), (_, other) in pairs:
        yield _compare(name, one, other)


def _shape(specs: dict, name: str) -> str:
    return str(list(specs[name].shape)) if name in specs else "absent"


def _compare(
    name: str, left: np.ndarray | MXFP4Array, right: np.ndarray | MXFP4Array
) -> Difference:
    if isinstance(left, MXFP4Array) and isinstance(right, MXFP4Array):
        same = np.array_equal(left.blocks, right.blocks) and np.array_equal(
            left.scales, right.scales
        )
        if same:  # nothing to decode
            return Difference(name, left.size, 0, 0.0, 0.0)
    different, largest, error, power = 0, 0.0, 0.0, 0.0
    step = max(1, _CHUNK * left.shape[0] // left.size)
    for first in range(0, left.shape[0], step):
        rows = slice(first, first + step)
        a, b = _values(left, rows), _values(right, rows)
        unequal = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        count = int(np.count_nonzero(unequal))
        if count:
            different += count
            with np.errstate(invalid="ignore"):  # inf - inf is a difference of NaN
                errors = np.abs(a[unequal] - b[unequal])
            largest = float(np.maximum(largest, np.max(errors)))  # keeps NaN, unlike max()
            error += float(np.sum(errors**2))
        power += float(np.sum(np.square(a[np.isfinite(a)])))
    relative = math.sqrt(error / power) if power else (math.inf if error else 0.0)
    return Difference(name, left.size, different, largest, relative)


def _values(parameter: np.ndarray | MXFP4Array, rows: slice) -> np.ndarray:
    """Return some rows as float64, exactly."""
    if isinstance(parameter, MXFP4Array):
        part = parameter[rows]
        return np.asarray(decode(part.blocks, part.scales, np.float32)).astype(np.float64)
    return parameter[rows].astype(np.float64)

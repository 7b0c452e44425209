"""Comparing two checkpoints, parameter by parameter."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import (
    CheckpointError,
    Parameters,
    ParameterSpec,
    Progress,
    open_checkpoint,
)
from jax_mxfp4.checkpoints.dequantizing import decode_blocks
from jax_mxfp4.checkpoints.logical_tensors import boxes
from jax_mxfp4.inspection.opening import open_parameters

# Elements that are compared at a time, as float64.
_CHUNK = 2**22


@dataclass(frozen=True)
class Difference:
    """How one parameter differs between two checkpoints; values, not their representation.

    Attributes:
      name: canonical name of a parameter of GPT-OSS, else as stored.
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


def diff(
    left: str | Path, right: str | Path, progress: Progress | None = None
) -> Iterator[Difference]:
    """Compare two checkpoints of one model, in any layout, packed or not, parameter by parameter.

    A few million values at a time are in memory.

    Args:
      left: a folder, or a file `*.gguf`; errors are relative to this one.
      right: the other.
      progress: called after each parameter with (name, bytes of `left` so far, bytes of all).

    Yields:
      A `Difference` for each parameter, also those that are equal.

    Raises:
      CheckpointError: one cannot be read, or the two are not of one shape.
    """
    one, other = (open_parameters(path, open_checkpoint(path)) for path in (left, right))
    problems = [
        f"{name!r}: {_shape(one.specs, name)} in {left}, {_shape(other.specs, name)} in {right}"
        for name in {**one.specs, **other.specs}
        if _shape(one.specs, name) != _shape(other.specs, name)
    ]
    if problems:
        raise CheckpointError(right, problems)
    total = sum(map(one.stored_bytes, one.specs))
    done = 0
    for name in one.specs:
        yield _compare(name, one, other)
        if progress is not None:
            done += one.stored_bytes(name)
            progress(name, done, total)


def _shape(specs: Mapping[str, ParameterSpec], name: str) -> str:
    return str(list(specs[name].shape)) if name in specs else "absent"


def _compare(name: str, left: Parameters, right: Parameters) -> Difference:
    shape = left.specs[name].shape
    different, largest, error, power = 0, 0.0, 0.0, 0.0
    # Whole rows: packed and unpacked ones can be cut alike.
    for part in boxes(shape[:-1], max(1, _CHUNK // max(1, math.prod(shape[-1:])))):
        a, b = left.read(name, part), right.read(name, part)
        a, b = _values(a), _values(b)
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
    return Difference(name, math.prod(shape), different, largest, relative)


def _values(parameter: np.ndarray | MXFP4Array) -> np.ndarray:
    """Return what was read as float64, exactly."""
    if isinstance(parameter, MXFP4Array):
        parameter = decode_blocks(parameter.blocks, parameter.scales, np.dtype(np.float32))
    return parameter.astype(np.float64)

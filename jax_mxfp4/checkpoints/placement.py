"""Parameters onto devices, one at a time, as they are read."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.gpt_oss_layout import ParameterSpec
from jax_mxfp4.checkpoints.gpt_oss_loader import Progress
from jax_mxfp4.checkpoints.logical_tensors import boxes
from jax_mxfp4.checkpoints.stored_array import Part, aligned_empty, box, box_shape, shift

Target = jax.Device | Sharding | None
"""Where an array goes; None is JAX's default device."""

Placement = Target | Callable[[str, tuple[int, ...]], Target]
"""Where each parameter goes: one target for all, or a function of name and logical shape.

The leaves of a packed parameter [..., K], blocks [..., K / 32, 16] and scales [..., K / 32], are
sharded alike. A `NamedSharding` that fits the logical shape therefore fits them, as long as each
part of a sharded K is made of whole blocks.
"""

# Elements that a thread converts at a time.
_PIECE = 2**21
_THREADS = 4
# Bytes that may be on their way to an accelerator while the next parameter is read.
_IN_FLIGHT = 2**29


class Parameters(Protocol):
    """What has parameters to place, such as `GptOssParameters`."""

    @property
    def specs(self) -> Mapping[str, ParameterSpec]:
        """Name -> shape of each parameter, and whether it is packed."""
        ...

    def read(self, name: str, part: Part = ()) -> np.ndarray | MXFP4Array:
        """Return a parameter, or a part of its `ParameterSpec.part_shape`."""
        ...

    def stored_bytes(self, name: str) -> int:
        """Return the size of a parameter in its file."""
        ...


def place_parameters(
    parameters: Parameters,
    dtype: DTypeLike | None = None,
    sharding: Placement = None,
    progress: Progress | None = None,
    prepare: Callable[[MXFP4Array], MXFP4Array] | None = None,
) -> Iterator[tuple[str, jax.Array | MXFP4Array]]:
    """Yield every parameter on its device or devices, in the order of `parameters.specs`.

    Of a parameter that is spread over devices only one device's part is read at a time, and only
    those of devices that this process can address. Beside the arrays that have been yielded, one
    such part or parameter is in the host's memory, and a few megabytes of it as it is stored if its
    dtype is converted; while it is on its way to an accelerator, further ones of 512 MiB at most.

    A CPU device takes over the arrays that are read, without a copy.

    Args:
      parameters: what to read.
      dtype: of the dense parameters; None for their stored ones.
      sharding: see `Placement`.
      progress: called after each parameter with (name, bytes read so far, bytes of all).
      prepare: called with each packed parameter once it is on its way to its devices; what it
        returns is yielded instead. `jax_mxfp4.prepare_on_cuda` with donation brings one parameter
        after the other into the layout that the CUDA kernels read.

    Yields:
      (name, `jax.Array` or, if it is packed, `MXFP4Array` of such).

    Raises:
      CheckpointError: a file cannot be read, or has become shorter.
      TypeError: `sharding` is, or returned, something else.
      ValueError: `sharding` does not fit parameters; all of them are listed, before one is read.
    """
    plans = _plan(parameters.specs, sharding)
    total = sum(map(parameters.stored_bytes, parameters.specs))
    done = 0
    under_way = _UnderWay()
    for name, (target, shards) in plans.items():
        under_way.make_room(parameters.stored_bytes(name))
        if isinstance(target, Sharding) and shards:
            array = _place_shards(parameters, name, dtype, target, shards)
        else:
            array = jax.device_put(_read(parameters, name, dtype), target)
        if prepare is not None and isinstance(array, MXFP4Array):
            array = prepare(array)
        under_way.add(array, parameters.stored_bytes(name))
        yield name, array
        if progress is not None:
            done += parameters.stored_bytes(name)
            progress(name, done, total)


@dataclass(frozen=True)
class _Shard:
    """A part of a parameter, and the devices that are to have it."""

    part: Part
    devices: list[Any]


class _UnderWay:
    """Transfers that may not be complete, and keep memory of the host until they are."""

    def __init__(self) -> None:
        self._transfers: deque[tuple[jax.Array | MXFP4Array, int]] = deque()
        self._nbytes = 0

    def add(self, array: jax.Array | MXFP4Array, nbytes: int) -> None:
        self._transfers.append((array, nbytes))
        self._nbytes += nbytes

    def make_room(self, nbytes: int) -> None:
        """Wait until `nbytes` more are within bounds, or nothing is under way."""
        while self._transfers and self._nbytes + nbytes > _IN_FLIGHT:
            array, size = self._transfers.popleft()
            jax.block_until_ready(array)
            self._nbytes -= size


def _plan(
    specs: Mapping[str, ParameterSpec], sharding: Placement
) -> dict[str, tuple[Target, list[_Shard]]]:
    """Return for each parameter its target and, if that has several devices, the parts."""
    plans: dict[str, tuple[Target, list[_Shard]]] = {}
    problems = []
    for name, spec in specs.items():
        is_function = callable(sharding)
        target = sharding(name, spec.shape) if is_function else sharding
        if target is not None and not isinstance(target, (jax.Device, Sharding)):
            raise TypeError(
                f"sharding{f' of {name!r}' if is_function else ''}: expected a jax.Device, a "
                f"jax.sharding.Sharding or None, found {type(target).__name__}"
            )
        shards = []
        if isinstance(target, Sharding) and not isinstance(target, SingleDeviceSharding):
            try:
                shards = _shards(spec, target)
            except ValueError as error:
                problems.append(f"{name!r} {list(spec.shape)}: {' '.join(str(error).split())}")
        plans[name] = target, shards
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"sharding: does not fit {len(problems)} parameters{lines}")
    return plans


def _leaf_shapes(spec: ParameterSpec) -> tuple[tuple[int, ...], ...]:
    if not spec.packed:
        return (spec.shape,)
    return tuple(leaf.shape for leaf in jax.tree.leaves(MXFP4Array.shape_dtype(spec.shape)))


def _shards(spec: ParameterSpec, sharding: Sharding) -> list[_Shard]:
    """Return the parts of a parameter that devices of this process are to have.

    Raises:
      ValueError: the sharding does not fit.
    """
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(spec.shape):
        raise ValueError(f"{sharding} is for at least {len(sharding.spec)} axes")
    shapes = _leaf_shapes(spec)
    # The last leaf has the axes of `spec.part_shape`; blocks have one more, which stays whole.
    parts = sharding.addressable_devices_indices_map(shapes[-1])
    for shape in shapes[:-1]:
        for device, part in sharding.addressable_devices_indices_map(shape).items():
            if _bounds(part, shape) != (*_bounds(parts[device], shapes[-1]), (0, shape[-1])):
                raise ValueError(f"{sharding} would part blocks from their scales")
    shards: dict[tuple[tuple[int, int], ...], _Shard] = {}
    for device, part in parts.items():
        bounds = _bounds(part, shapes[-1])
        shard = shards.setdefault(bounds, _Shard(tuple(slice(*ends) for ends in bounds), []))
        shard.devices.append(device)
    return list(shards.values())


def _bounds(part: Part | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    whole = part or (slice(None),) * len(shape)
    return tuple(one.indices(size)[:2] for one, size in zip(whole, shape, strict=True))


def _place_shards(
    parameters: Parameters,
    name: str,
    dtype: DTypeLike | None,
    sharding: Sharding,
    shards: list[_Shard],
) -> jax.Array | MXFP4Array:
    leaves: list[list[jax.Array]] = []
    for shard in shards:
        values = jax.tree.leaves(_read(parameters, name, dtype, shard.part))
        for device in shard.devices:
            target = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            leaves.append([jax.device_put(value, target) for value in values])
        jax.block_until_ready(leaves[-len(shard.devices) :])
    arrays = [
        jax.make_array_from_single_device_arrays(shape, sharding, list(parts))
        for shape, parts in zip(
            _leaf_shapes(parameters.specs[name]), zip(*leaves, strict=True), strict=True
        )
    ]
    if parameters.specs[name].packed:
        return MXFP4Array(arrays[0], arrays[1])
    return arrays[0]


def _read(
    parameters: Parameters, name: str, dtype: DTypeLike | None, part: Part = ()
) -> np.ndarray | MXFP4Array:
    """Return (a part of) a parameter, converted piece by piece to `dtype` if it is dense."""
    spec = parameters.specs[name]
    if spec.packed or dtype is None:
        return parameters.read(name, part)
    if not spec.shape:
        return np.asarray(parameters.read(name)).astype(np.dtype(dtype))
    # No rows at all cost nothing, and have the stored dtype.
    if np.asarray(parameters.read(name, (slice(0, 0),))).dtype == np.dtype(dtype):
        return parameters.read(name, part)
    part = box(part, spec.shape)
    shape = box_shape(part)
    converted = aligned_empty(shape, np.dtype(dtype))

    def convert(piece: Part) -> None:
        converted[piece] = parameters.read(name, shift(box(piece, shape), part))

    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(convert, boxes(shape, _PIECE)):
            pass
    return converted

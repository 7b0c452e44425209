"""Times `dequantize` and `take` on large outputs, against the copy roof."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from chain import compile_chain
from check import WrongResult, decode, rows_of, spread
from jax import Array
from matmul import Settings, random_packed
from roofs import Roofs
from shapes import SHAPES, Shape, calls_of, copies_of
from timing import measure

import jax_mxfp4 as mx


@dataclass(frozen=True)
class Unpacking:
    """Rows of a weight to decode: all of them, or as many as `take` is given ids."""

    name: str
    weight: Shape
    ids: int | None = None

    @property
    def op(self) -> str:
        """The name of the operation."""
        return "dequantize" if self.ids is None else "take"

    @property
    def rows(self) -> int:
        """Rows of the output."""
        return self.weight.n if self.ids is None else self.ids

    @property
    def moved_bytes(self) -> int:
        """Packed rows read, ids read, bfloat16 rows written."""
        packed = self.rows * self.weight.k * 17 // 32
        return packed + 4 * (self.ids or 0) + 2 * self.rows * self.weight.k


UNPACKINGS = (
    Unpacking("lm_head", SHAPES["lm_head"]),
    Unpacking("gate_up of 32 experts", Shape("experts", 32 * 5760, 2880)),
    Unpacking("llama70b_up", SHAPES["llama70b_up"]),
    Unpacking("gate_up", SHAPES["gate_up"]),
    *(Unpacking(f"embedding of {n} ids", SHAPES["lm_head"], n) for n in (4096, 16384, 65536)),
)


def decode_op(x: Array, w: mx.MXFP4Array) -> Array:
    """`dequantize`, or `take` where there are ids, of a prepared weight, as models have on CUDA."""
    implementation = None if jax.default_backend() == "cpu" else "cuda"
    if not x.size:
        return mx.dequantize(w, implementation=implementation)
    return mx.take(w, x, implementation=implementation)


def measure_unpackings(
    unpackings: tuple[Unpacking, ...],
    roofs: Roofs,
    settings: Settings,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """One row each.

    Raises:
      WrongResult: the decoded values are not exact.
    """
    for unpacking in unpackings:
        shape = unpacking.weight
        weights = random_packed(shape, copies_of(shape.packed_bytes, settings.rotation_bytes))
        ids = jax.random.randint(jax.random.key(2), (unpacking.ids or 0,), 0, shape.n)
        floor = unpacking.moved_bytes / roofs.hbm_copy_gbs * 1e-3
        calls = calls_of(len(weights), floor, settings.calls)
        chain = compile_chain(decode_op, ids, weights, calls)

        state = chain.run(chain.fresh_state(), ids, tuple(weights))
        _check(unpacking, state[1], ids, weights[(calls - 1) % len(weights)])
        timing, _ = measure(
            lambda s, run=chain.run, ids=ids, weights=tuple(weights): run(s, ids, weights),
            state,
            calls,
            samples=settings.samples,
        )
        say(f"{unpacking.op} {unpacking.name}: {timing.us:.2f} us")
        yield {
            "op": unpacking.op,
            "name": unpacking.name,
            "rows": unpacking.rows,
            "K": shape.k,
            "impl": "jax_mxfp4",
            **{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(timing).items()},
            "calls": calls,
            "copies": len(weights),
            "one_graph": chain.one_graph,
            "kernels": chain.kernels,
            "floor_us": round(floor, 3),
            "gbs": round(unpacking.moved_bytes / timing.us * 1e-3, 1),
            "roof_fraction": float(f"{floor / timing.us:.4g}"),
        }


def _check(unpacking: Unpacking, decoded: Array, ids: Array, w: mx.MXFP4Array) -> None:
    rows = spread(unpacking.rows)
    source = rows if unpacking.ids is None else np.asarray(ids)[rows]
    exact = decode(w[source])
    if not np.array_equal(rows_of(decoded, rows).astype(np.float64), exact):
        raise WrongResult(f"{unpacking.op} {unpacking.name}: decoded values are not exact")

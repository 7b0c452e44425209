"""Times `jax_mxfp4.matmul` and cuBLAS in bfloat16 on the named shapes."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chain import AUTOTUNED, Chain, Options, compile_chain
from check import check_product, decode, rows_of, spread
from jax import Array, lax
from roofs import Roofs
from shapes import ROTATION_BYTES, Shape, calls_of, copies_of, floor_us
from timing import measure

import jax_mxfp4 as mx

OURS, CUBLAS = "jax_mxfp4", "cublas_bf16"

# Which algorithm of cuBLAS: the first choice of its heuristic, or what XLA finds fastest by trial.
CUBLAS_VARIANTS: dict[str, list[tuple[str, Options]]] = {
    "heuristic": [("heuristic", {})],
    "autotuned": [("autotuned", AUTOTUNED)],
    "best": [("heuristic", {}), ("autotuned", AUTOTUNED)],
}


@dataclass(frozen=True)
class Settings:
    """What a run may vary.

    Attributes:
      samples: how many samples the median is taken of.
      calls: least number of calls in a program.
      rotation_bytes: how much memory the copies of a weight fill at least.
      cublas: a key of `CUBLAS_VARIANTS`.
      deadline: `time.monotonic` at which to stop.
    """

    samples: int = 9
    calls: int = 200
    rotation_bytes: int = ROTATION_BYTES
    cublas: str = "heuristic"
    deadline: float = float("inf")


@dataclass(frozen=True)
class Candidate:
    """One implementation with its weights."""

    impl: str
    variant: str
    op: Callable[[Any, Any], Array]
    weights: Sequence[Any]
    options: Options


class OutOfTime(Exception):
    """The time limit came before the last row."""


def ours(x: Array, w: mx.MXFP4Array) -> Array:
    """`jax_mxfp4.matmul` with a prepared weight, as models have it on CUDA."""
    implementation = None if jax.default_backend() == "cpu" else "cuda"
    return mx.matmul(x, w, implementation=implementation)


def cublas(x: Array, w: Array) -> Array:
    """x [M, K] times w [N, K] transposed, in bfloat16 with float32 accumulation."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def random_packed(shape: Shape, copies: int) -> list[mx.MXFP4Array]:
    """Random weights on the device, of magnitudes 2^-8 to 0.75: all codes, scales 120 to 124.

    They are prepared, once and before anything is timed.
    """

    @jax.jit
    def one(key: Array) -> mx.MXFP4Array:
        to_blocks, to_scales = jax.random.split(key)
        groups = (shape.n, shape.k // 32)
        blocks = jax.random.bits(to_blocks, (*groups, 16), jnp.uint8)
        scales = 120 + jax.random.bits(to_scales, groups, jnp.uint8) % 5
        return mx.prepare(mx.MXFP4Array(blocks, scales))

    return [one(jax.random.key(i)) for i in range(copies)]


def measure_shape(
    shape: Shape,
    ms: Sequence[int],
    roofs: Roofs,
    settings: Settings,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """One row for each M and implementation; all programs are compiled before any is timed.

    Raises:
      WrongResult: an implementation is wrong; nothing is timed that was not checked.
      OutOfTime: the deadline is over.
    """
    packed = random_packed(shape, copies_of(shape.packed_bytes, settings.rotation_bytes))
    unpack = jax.jit(lambda w: mx.dequantize(w, implementation="reference"))
    dense = [unpack(w) for w in packed[: copies_of(shape.bf16_bytes, settings.rotation_bytes)]]
    candidates = [Candidate(OURS, "", ours, packed, {})] + [
        Candidate(CUBLAS, variant, cublas, dense, options)
        for variant, options in CUBLAS_VARIANTS[settings.cublas]
    ]
    x = jax.random.normal(jax.random.key(1), (max(ms), shape.k), jnp.bfloat16)
    expected = Expected(shape, packed)

    start = time.monotonic()
    jobs = [(m, candidate) for m in ms for candidate in candidates]
    # XLA compiles outside of Python's lock. Autotuning runs on the device, so one at a time.
    workers = min(8, os.cpu_count() or 1) if settings.cublas == "heuristic" else 1
    with ThreadPoolExecutor(workers) as pool:
        chains = list(pool.map(lambda job: _compile(shape, *job, roofs, settings), jobs))
    say(f"{shape.name}: {len(jobs)} programs compiled in {time.monotonic() - start:.0f} s")

    best: dict[str, dict[str, Any]] = {}
    for (m, candidate), chain in zip(jobs, chains, strict=True):
        if time.monotonic() > settings.deadline:
            raise OutOfTime(f"stopped before {shape.name}, M = {m}")
        row = _measure_one(shape, m, candidate, chain, x[:m], expected, roofs, settings)
        say(_progress(row))
        if candidate.impl not in best or row["us"] < best[candidate.impl]["us"]:
            best[candidate.impl] = row
        if candidate is candidates[-1]:
            yield from best.values()
            best = {}


class Expected:
    """What a few rows of the weights are in float64."""

    def __init__(self, shape: Shape, packed: Sequence[mx.MXFP4Array]) -> None:
        """Fetch some rows of the first copies and the first row of each."""
        self.columns = spread(shape.n)
        self._packed = packed
        self._rows: dict[int, np.ndarray] = {}
        self.first = np.stack([decode(w[0]) for w in packed])

    def rows(self, copy: int) -> np.ndarray:
        """Rows `columns` of a copy, which are columns of the product."""
        if copy not in self._rows:
            self._rows[copy] = decode(rows_of(self._packed[copy], self.columns))
        return self._rows[copy]


def _compile(shape: Shape, m: int, candidate: Candidate, roofs: Roofs, settings: Settings) -> Chain:
    copies = len(candidate.weights)
    calls = calls_of(copies, _floor(shape, m, candidate.impl, roofs), settings.calls)
    x = jax.ShapeDtypeStruct((m, shape.k), jnp.bfloat16)
    return compile_chain(candidate.op, x, candidate.weights, calls, candidate.options)


def _floor(shape: Shape, m: int, impl: str, roofs: Roofs) -> float:
    weight = shape.packed_bytes if impl == OURS else shape.bf16_bytes
    moved = weight + shape.activation_bytes(m)
    return floor_us(moved, shape.flops(m), roofs.hbm_read_gbs, roofs.bf16_tflops)


def _measure_one(
    shape: Shape,
    m: int,
    candidate: Candidate,
    chain: Chain,
    x: Array,
    expected: Expected,
    roofs: Roofs,
    settings: Settings,
) -> dict[str, Any]:
    what = f"{candidate.impl} {shape.name} M={m}"
    weights = tuple(candidate.weights)

    state = chain.run(chain.fresh_state(), x, weights)
    copies = len(weights)
    rows = spread(m)
    last = rows_of(state[1], rows)[:, expected.columns]
    x_rows = rows_of(x, rows)
    check_product(what, last, x_rows, expected.rows((chain.calls - 1) % copies))
    order = np.arange(chain.calls) % copies
    samples = np.asarray(state[0])[None]
    check_product(f"{what}, first elements", samples, x_rows[:1], expected.first[order])

    timing, _ = measure(
        lambda s: chain.run(s, x, weights), state, chain.calls, samples=settings.samples
    )
    weight_bytes = shape.packed_bytes if candidate.impl == OURS else shape.bf16_bytes
    floor = _floor(shape, m, candidate.impl, roofs)
    return {
        "op": "matmul",
        "name": shape.name,
        "N": shape.n,
        "K": shape.k,
        "M": m,
        "impl": candidate.impl,
        **({"variant": candidate.variant} if candidate.variant else {}),
        **{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(timing).items()},
        "calls": chain.calls,
        "copies": copies,
        "one_graph": chain.one_graph,
        "kernels": chain.kernels,
        "floor_us": round(floor, 3),
        "gbs": round((weight_bytes + shape.activation_bytes(m)) / timing.us * 1e-3, 1),
        "tflops": float(f"{shape.flops(m) / timing.us * 1e-6:.4g}"),
        "roof_fraction": float(f"{floor / timing.us:.4g}"),
    }


def _progress(row: dict[str, Any]) -> str:
    notes = "" if row["one_graph"] is not False else "  NOT IN ONE GRAPH"
    notes += "  LIMITED BY THE HOST" if row["host_bound"] else ""
    return f"{row['name']} M={row['M']} {row['impl']}: {row['us']:.2f} us{notes}"

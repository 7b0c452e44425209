"""What the device can do at most: HBM bandwidth, read and copied, and bfloat16 arithmetic."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from chain import Op, compile_chain
from jax import Array, lax
from timing import measure

BUFFER_BYTES = 512 * 2**20
GEMM_SIZE = 8192

# How a large uint32 array is read: [rows, columns], reduced along the columns. Which of them XLA
# does best differs between versions, and the roof is the best one.
_READS: dict[str, tuple[Callable[[Array], Array], int]] = {
    "max of rows of 4 KiB": (lambda w: jnp.max(w, axis=1), 2**10),
    "max of rows of 16 KiB": (lambda w: jnp.max(w, axis=1), 2**12),
    "max of rows of 64 KiB": (lambda w: jnp.max(w, axis=1), 2**14),
    "max of rows of 256 KiB": (lambda w: jnp.max(w, axis=1), 2**16),
    "or of rows of 16 KiB": (lambda w: _or_rows(w), 2**12),
}


@dataclass(frozen=True)
class Roofs:
    """Measured limits: GB/s read, GB/s copied (read and written bytes), TFLOP/s in bfloat16."""

    hbm_read_gbs: float
    hbm_copy_gbs: float
    bf16_tflops: float
    read_by: str


def _or_rows(w: Array) -> Array:
    return lax.reduce(w, jnp.uint32(0), lax.bitwise_or, (1,))


def seconds_per_call(op: Op, x: Array, weights: list[Array], calls: int, samples: int) -> float:
    """Median time of one call in a chain."""
    chain = compile_chain(op, x, weights, calls)
    state = chain.fresh_state()
    timing, _ = measure(lambda s: chain.run(s, x, tuple(weights)), state, calls, samples=samples)
    return timing.us * 1e-6


def measure_roofs(
    *, buffer_bytes: int = BUFFER_BYTES, gemm_size: int = GEMM_SIZE, samples: int = 9
) -> Roofs:
    """Measure the three roofs on the default device, on random data."""
    read_gbs, read_by = max(
        (_read_gbs(read, columns, buffer_bytes, samples), name)
        for name, (read, columns) in _READS.items()
    )
    a, b = _random_words(2, buffer_bytes, 2**12)
    # Two buffers, each larger than any cache. One bit flips, so that nothing is elided.
    seconds = seconds_per_call(lambda x, w: w ^ x, jnp.uint32(1), [a, b], 32, samples)
    del a, b
    return Roofs(
        read_gbs,
        2 * buffer_bytes / seconds * 1e-9,
        _bf16_tflops(gemm_size, samples),
        read_by,
    )


def _read_gbs(
    read: Callable[[Array], Array], columns: int, buffer_bytes: int, samples: int
) -> float:
    buffers = _random_words(2, buffer_bytes, columns)
    seconds = seconds_per_call(lambda _, w: read(w), jnp.uint32(0), buffers, 64, samples)
    return buffer_bytes / seconds * 1e-9


def _random_words(count: int, size: int, columns: int) -> list[Array]:
    shape = (size // 4 // columns, columns)
    return [jax.random.bits(jax.random.key(i), shape, jnp.uint32) for i in range(count)]


def _bf16_tflops(size: int, samples: int) -> float:
    keys = jax.random.split(jax.random.key(0), 3)
    x, *weights = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    seconds = seconds_per_call(lambda x, w: x @ w.T, x, weights, 16, samples)
    return 2 * size**3 / seconds * 1e-12

"""Wall time of compiled chains."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax

T = TypeVar("T")

WARM_UP = 3  # XLA records the graph in the second run
MAX_BURST = 16  # fewer than the runs that JAX lets wait in the queue (32)


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over several samples.

    Attributes:
      us, us_min, us_max: median, least and most.
      samples: how many there are.
      runs: executions of the program per sample, queued without waiting in between.
      host_bound: the host needed nearly all the time to queue them, so the device was not what
        was measured.
    """

    us: float
    us_min: float
    us_max: float
    samples: int
    runs: int
    host_bound: bool


def measure(
    run: Callable[[T], T],
    state: T,
    calls: int,
    *,
    samples: int = 9,
    sample_seconds: float = 8e-3,
    warm_up: int = WARM_UP,
) -> tuple[Timing, T]:
    """Time ``run``, a program of `calls` calls that passes on its state.

    A sample is as many executions as fill `sample_seconds` (1 to 16), queued back to back and
    waited for once: each execution needs the state of the one before, and what it costs to start
    one from Python is hidden behind the execution before it.

    Returns:
      the timing and the last state.
    """
    state = jax.block_until_ready(state)
    for _ in range(warm_up):
        state = jax.block_until_ready(run(state))
    start = time.perf_counter()
    state = jax.block_until_ready(run(state))
    once = time.perf_counter() - start
    runs = max(1, min(MAX_BURST, round(sample_seconds / once)))

    totals, queueing = [], []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(runs):
            state = run(state)
        queued = time.perf_counter()
        state = jax.block_until_ready(state)
        totals.append(time.perf_counter() - start)
        queueing.append(queued - start)
    per_call = [total / (runs * calls) * 1e6 for total in totals]
    host_bound = runs > 1 and statistics.median(queueing) > 0.9 * statistics.median(totals)
    timing = Timing(
        statistics.median(per_call), min(per_call), max(per_call), samples, runs, host_bound
    )
    return timing, state

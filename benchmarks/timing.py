"""Wall time of compiled chains."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax

T = TypeVar("T")

WARM_UP = 3  # XLA records the graph in the second run
LONGER = 3  # how much longer the second burst of a sample is
MAX_BURST = 10  # LONGER times that is fewer than the runs that JAX lets wait in its queue (32)
MAX_TRIES = 4  # for each sample


class Unsteady(Exception):
    """More work took less time, time and again."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over several samples.

    Attributes:
      us, us_min, us_max: median, least and most.
      samples: how many there are.
      runs: executions of the program that a sample's two bursts differ by.
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
    before_sample: Callable[[T], T] = lambda state: state,
) -> tuple[Timing, T]:
    """Time ``run``, a program of `calls` calls that passes on its state.

    A burst is a number of executions that are queued back to back and waited for once: each needs
    the state of the one before, and what it costs to start one from Python is hidden behind the
    one before. Starting the first and waiting for the last cost 0.8 ms beside a burst of 8 ms
    (measured: an H100, programs of 200 arguments). A sample is therefore the difference of two
    bursts, as many executions as fill `sample_seconds` (1 to 10) and three times as many.
    `before_sample` makes the state of the first from what the sample before has left.

    Returns:
      the timing and the last state.

    Raises:
      Unsteady: longer bursts take less time than shorter ones.
    """
    state = jax.block_until_ready(state)
    for _ in range(warm_up):
        state = jax.block_until_ready(run(state))
    start = time.perf_counter()
    state = jax.block_until_ready(run(state))
    once = time.perf_counter() - start
    runs = max(1, min(MAX_BURST, round(sample_seconds / once)))

    def burst(runs: int) -> tuple[float, float]:
        """Seconds until all are queued, and until the last is done."""
        nonlocal state
        start = time.perf_counter()
        for _ in range(runs):
            state = run(state)
        queued = time.perf_counter()
        state = jax.block_until_ready(state)
        return queued - start, time.perf_counter() - start

    more = (LONGER - 1) * runs
    differences: list[float] = []
    queueing, totals = [], []
    for _ in range(MAX_TRIES * samples):
        state = jax.block_until_ready(before_sample(state))
        _, short = burst(runs)
        queued, long = burst(LONGER * runs)
        queueing.append(queued)
        totals.append(long)
        if long > short:  # else something else had the machine meanwhile
            differences.append(long - short)
        if len(differences) == samples:
            break
    else:
        raise Unsteady(
            f"of {MAX_TRIES * samples} bursts only {len(differences)} took longer than others of "
            f"a third of the executions: something else uses this machine"
        )
    per_call = [difference / (more * calls) * 1e6 for difference in differences]
    host_bound = statistics.median(queueing) > 0.9 * statistics.median(totals)
    timing = Timing(
        statistics.median(per_call), min(per_call), max(per_call), samples, more, host_bound
    )
    return timing, state

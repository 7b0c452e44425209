"""How the time of a program on the device divides among its kernels, from JAX's profiler."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

# XLA numbers kernels of a kind: loop_add_fusion_3 is one of the loop_add_fusions.
_NUMBER = re.compile(r"[_.]\d+")
_TEMPLATE = re.compile(r"[<(].*")
_UNNAMED = "(anonymous namespace)::"


def kernel_times(run: Callable[[], Any], runs: int, top: int = 15) -> list[dict[str, Any]]:
    """Profile `runs` calls and return what takes most time on the device.

    XLA launches the kernels of a CUDA graph one by one while the profiler is on: times between
    kernels are not those of the graph, times of kernels are.

    Args:
      run: launches the program once and returns its results.
      runs: how often to call it.
      top: how many kinds of kernels to list; the others are added up under "other".

    Returns:
      {"kernel", "calls", "us"} of each kind, per run, the longest first; [] without a GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(run())
        [trace] = Path(folder).rglob("*.xplane.pb")
        return summarize(ProfileData.from_file(str(trace)), runs, top)


def summarize(profile: ProfileData, runs: int, top: int) -> list[dict[str, Any]]:
    """Add up the events of the GPUs' streams by kind of kernel."""
    calls: dict[str, int] = defaultdict(int)
    nanoseconds: dict[str, float] = defaultdict(float)
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU:"):
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    kind = kind_of(event.name)
                    calls[kind] += 1
                    nanoseconds[kind] += event.duration_ns
    kinds = sorted(calls, key=lambda kind: -nanoseconds[kind])
    rows = [_row(kind, calls[kind], nanoseconds[kind], runs) for kind in kinds[:top]]
    if kinds[top:]:
        rest = (sum(table[kind] for kind in kinds[top:]) for table in (calls, nanoseconds))
        rows.append(_row("other", *rest, runs))
    return rows


def kind_of(name: str) -> str:
    """A kernel's name without numbers, template arguments, return type and parameters."""
    plain = _TEMPLATE.sub("", name.replace(_UNNAMED, "")).split(" ")[-1] or name
    return _NUMBER.sub("", plain.split("::")[-1])


def _row(kind: str, calls: float, nanoseconds: float, runs: int) -> dict[str, Any]:
    return {
        "kernel": kind,
        "calls": round(calls / runs, 2),
        "us": round(nanoseconds / runs * 1e-3, 3),
    }

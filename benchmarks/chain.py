"""Programs that call an operation many times, each call after the one before.

Between two calls stands an `optimization_barrier` that takes the result of the first and the
arguments of the second, so the compiler can neither reorder nor merge calls, and no kernel is
added. A barrier loses results that nobody reads, and the calls with them; one element of each
result is therefore gathered into `samples`, which costs one small kernel per hundred calls and
lets every call be checked.

On GPUs XLA turns the program into a CUDA graph (a command buffer). Barriers are gone by then, so
SERIALIZE makes the graph launch its nodes one after the other, as the program has them.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

# Results that wait for their sample to be taken may use this much memory.
LIVE_BYTES = 8 * 2**30

Op = Callable[[Any, Any], Array]
State = tuple[Array, Array]
Options = dict[str, bool | int | str]

GPU_OPTIONS: Options = {
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
    # bfloat16 products go to cuBLAS, with the algorithm that its own heuristic ranks first.
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
    # It pads M to a multiple of 8 with two kernels more per call; cuBLAS takes any M.
    "xla_disable_hlo_passes": "cublas-pad-for-gemms",
}
AUTOTUNED: Options = {"xla_gpu_autotune_level": 4}

# A line of XLA's dump of thunks about something that runs on the device, such as
# "002: kCustomKernel [prev=001 (1) | sink ] loop_concatenate_fusion_1 grid: ...".
_THUNK = re.compile(
    r": k(?P<kind>CustomCall|CublasLtMatmul|Gemm|CustomKernel|Kernel|Copy)\b"
    r"(?:\s*\[[^\]]*\])?(?:\s+(?P<name>[A-Za-z_]\w*?)(?:_\d+)?(?=\s|$))?"
)


@dataclass(frozen=True)
class Chain:
    """A compiled chain of calls.

    Attributes:
      run: (state, x, weights) -> state; the old state is donated.
      state: shapes of (samples [calls], last result).
      calls: how many calls one run makes.
      one_graph: whether all calls lie in one CUDA graph; None where XLA did not tell.
      kernels: what XLA launches once per call or more often; None where XLA did not tell.
    """

    run: Callable[[State, Any, Any], State]
    state: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    calls: int
    one_graph: bool | None
    kernels: str | None

    def fresh_state(self) -> State:
        """A state of NaN, or of the largest integer, which no call may leave behind."""
        samples, last = (jnp.full(s.shape, _poison(s.dtype), s.dtype) for s in self.state)
        return samples, last


def _poison(dtype: Any) -> Any:
    return jnp.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


def chained(op: Op, calls: int, live_bytes: int = LIVE_BYTES) -> Callable[[State, Any, Any], State]:
    """The function (state, x, weights) -> (samples [calls], result of the last call).

    Call i computes ``op(x, weights[i % len(weights)])``; ``samples[i]`` is its first element. The
    state that is passed in is ignored: it is there to be donated, so that results lie at the same
    addresses in every run and the graph needs no update.
    """

    def program(state: State, x: Any, weights: Sequence[Any]) -> State:
        before: Any = state
        samples: list[Array] = []
        waiting: list[Array] = []
        for i in range(calls):
            x_i, w_i, before = lax.optimization_barrier((x, weights[i % len(weights)], before))
            if waiting:
                waiting[-1] = before
            elif samples:
                samples[-1] = before
            before = op(x_i, w_i)
            waiting.append(before)
            if before.nbytes * len(waiting) >= live_bytes and i + 1 < calls:
                before = _samples(waiting)
                samples.append(before)
                waiting = []
        samples.append(_samples(waiting))
        return jnp.concatenate(samples), waiting[-1]

    return program


def _samples(results: list[Array]) -> Array:
    # Behind a barrier, or the compiler would compute the last result and its sample in one kernel.
    last = lax.optimization_barrier(results[-1])
    firsts = [lax.slice(y, (0,) * y.ndim, (1,) * y.ndim) for y in (*results[:-1], last)]
    return jnp.concatenate([first.reshape(1) for first in firsts])


def compile_chain(
    op: Op, x: Any, weights: Sequence[Any], calls: int, options: Options | None = None
) -> Chain:
    """Compile a chain for the default device.

    Args:
      op: (x, weight) -> result of one array.
      x, weights: arguments or their shapes; weights is a sequence of pytrees of one structure.
      calls: the length of the chain.
      options: compiler options, on GPUs only, added to `GPU_OPTIONS`.
    """
    result = jax.eval_shape(op, x, weights[0])
    samples = jax.ShapeDtypeStruct((calls,), result.dtype)
    state = (samples, jax.ShapeDtypeStruct(result.shape, result.dtype))
    program = jax.jit(chained(op, calls), donate_argnums=0)
    lowered = program.lower(state, x, tuple(weights))
    if jax.default_backend() == "cpu":
        return Chain(lowered.compile(), state, calls, None, None)
    with tempfile.TemporaryDirectory() as dump:
        to_dump: Options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=GPU_OPTIONS | (options or {}) | to_dump)
        thunks = sorted(Path(dump).rglob("*thunk_sequence*after_thunk_passes*.txt"))
        text = thunks[-1].read_text() if thunks else None
    if text is None:
        return Chain(compiled, state, calls, None, None)
    return Chain(compiled, state, calls, *read_thunks(text, calls))


def read_thunks(dump: str, calls: int) -> tuple[bool, str]:
    """Read a dump of thunks, in which those of a command buffer are indented deeper than it.

    Returns:
      whether there is one command buffer with at least `calls` launches and none outside of it;
      what is launched at least `calls` times, joined by " + ".
    """
    buffers, outside, depth = 0, 0, None
    inside: Counter[str] = Counter()
    for line in filter(str.strip, dump.splitlines()):
        indent = len(line) - len(line.lstrip())
        if depth is not None and indent <= depth:
            depth = None
        if depth is None and ": kCommandBuffer" in line:
            buffers, depth = buffers + 1, indent
        elif thunk := _THUNK.search(line):
            name = thunk["name"] if "Kernel" in thunk["kind"] else None
            inside[name or thunk["kind"]] += depth is not None
            outside += depth is None
    per_call = " + ".join(sorted(name for name, count in inside.items() if count >= calls))
    return buffers == 1 and per_call != "" and outside == 0, per_call

"""Times whole GPT-OSS models: decoding and prefill."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chain import read_thunks
from kernel_times import kernel_times
from matmul import OutOfTime, Settings
from model_costs import Cost, decode_cost, parameter_bytes, prefill_cost
from roofs import Roofs
from timing import measure

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.models.gpt_oss import GptOss, KVCache
from jax_mxfp4.models.gpt_oss.generate import Options, State, advance
from jax_mxfp4.models.gpt_oss.kv_formats import FP8Rows, Rows, encode_like

CONTEXTS = (128, 1024, 8192)
BATCHES = (1, 8, 64)
PROMPTS = (2048, 8192)

_PROFILED = 3  # runs under the profiler
_SECONDS = 0.25  # of a sample, as far as the limit on queued runs allows
# Positions beyond the context. Warming up, a sample and profiling add 4, 4 x 10 and 3 at most.
_ROOM = 256


@dataclass(frozen=True)
class Plan:
    """What to measure of a model.

    Attributes:
      batches: of decoding.
      contexts: of decoding, positions before the first timed token.
      prompts: lengths of one prompt, for prefill.
      cache_format: see `GptOss.init_cache`.
      kernels: how many kinds of kernels to list in a row's breakdown; 0 for no profile.
    """

    batches: Sequence[int] = BATCHES
    contexts: Sequence[int] = CONTEXTS
    prompts: Sequence[int] = PROMPTS
    cache_format: Any = None
    kernels: int = 15


def measure_model(
    name: str,
    model: GptOss,
    plan: Plan,
    roofs: Roofs,
    settings: Settings,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """One row for each prompt, then one for each batch and context, those of little memory first.

    Raises:
      OutOfTime: the deadline is over.
    """
    for length in plan.prompts:
        _check_time(settings, f"prefill of {length}")
        yield _row(name, _measure_prefill(model, length, plan, settings), model, plan, roofs, say)
    for batch in plan.batches:
        for context in plan.contexts:
            _check_time(settings, f"batch {batch}, context {context}")
            needed = _decode_bytes(model, batch, context, plan)
            if needed > _memory_limit():
                say(f"{name} batch {batch}, {context}: skipped, needs {needed * 1e-9:.1f} GB")
                continue
            found = _measure_decode(model, batch, context, plan, settings)
            yield _row(name, found, model, plan, roofs, say)


@dataclass(frozen=True)
class _Measured:
    phase: str
    batch: int
    context: int
    timing: Any
    tokens: int  # that one run processes
    cost: Cost
    one_graph: bool | None
    kernels: list[dict[str, Any]]


def _measure_prefill(model: GptOss, length: int, plan: Plan, settings: Settings) -> _Measured:
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))

    def run(state: tuple[Any, KVCache]) -> tuple[Any, KVCache]:
        return model.prefill(tokens, [length], state[1])

    state = (None, model.init_cache(1, length, plan.cache_format))
    state = run(state)  # before, the state has another structure
    timing, state = measure(run, state, 1, samples=settings.samples, sample_seconds=_SECONDS)
    _require_finite(state[0], f"prefill of {length}")
    kernels = _breakdown(run, state, plan)
    cost = prefill_cost(model.config, length)
    return _Measured("prefill", 1, length, timing, length, cost, None, kernels)


def _measure_decode(
    model: GptOss, batch: int, context: int, plan: Plan, settings: Settings
) -> _Measured:
    options = Options(
        jax.random.split(jax.random.key(0), batch), None, None, jnp.zeros(0, jnp.int32)
    )
    state = _state_at(model, batch, context, plan)
    step, one_graph = _compile(model, state, options)

    def run(state: State) -> State:
        return step(model.params, state, options)

    def restart(state: State) -> State:
        """Back to `context`: how many samples there will be is not known."""
        lengths = jnp.full(batch, context, jnp.int32)
        return replace(state, cache=replace(state.cache, lengths=lengths))

    timing, state = measure(
        run,
        state,
        1,
        samples=settings.samples,
        sample_seconds=_SECONDS,
        before_sample=restart,
    )
    if np.asarray(state.cache.lengths).max() > state.cache.max_len:
        raise AssertionError("the sequences have outgrown the cache")
    kernels = _breakdown(run, state, plan)
    cost = decode_cost(model.config, batch, context, plan.cache_format)
    return _Measured("decode", batch, context, timing, batch, cost, one_graph, kernels)


def _state_at(model: GptOss, batch: int, context: int, plan: Plan) -> State:
    """Sequences of random tokens and a cache of random keys and values for `context` positions."""
    cache = model.init_cache(batch, context + _ROOM, plan.cache_format)

    @partial(jax.jit, donate_argnums=0)
    def fill(rows: Rows, index: jax.Array) -> Rows:
        leaf = rows.codes if isinstance(rows, FP8Rows) else rows
        shape = rows.shape if isinstance(rows, MXFP4Array) else leaf.shape
        key = jax.random.fold_in(jax.random.key(0, impl="rbg"), index)
        # One position for all: what attention reads matters here, not what it finds.
        one = jax.random.normal(key, (*shape[:2], 1, shape[3]), model.dtype)
        encoded = encode_like(rows, one)
        return jax.tree.map(lambda new, old: jnp.broadcast_to(new, old.shape), encoded, rows)

    keys = tuple(fill(rows, np.uint32(2 * i)) for i, rows in enumerate(cache.keys))
    values = tuple(fill(rows, np.uint32(2 * i + 1)) for i, rows in enumerate(cache.values))
    lengths = jnp.full(batch, context, jnp.int32)
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, batch)
    return State(
        jnp.asarray(tokens, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        KVCache(keys, values, lengths, cache.max_len),
    )


def _compile(
    model: GptOss, state: State, options: Options
) -> tuple[Callable[..., State], bool | None]:
    """Compile a step; return it and whether it is one CUDA graph, None where XLA does not tell."""
    static = {"config": model.config, "implementation": model.implementation}
    lowered = advance.lower(model.params, state, options, **static)
    if jax.default_backend() == "cpu":
        return lowered.compile(), None
    with tempfile.TemporaryDirectory() as dump:
        compiled = lowered.compile(
            compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        )
        thunks = sorted(Path(dump).rglob("*thunk_sequence*after_thunk_passes*.txt"))
        return compiled, read_thunks(thunks[-1].read_text(), 1)[0] if thunks else None


def _breakdown(run: Callable[[Any], Any], state: Any, plan: Plan) -> list[dict[str, Any]]:
    if not plan.kernels or jax.default_backend() == "cpu":
        return []

    def once() -> Any:
        nonlocal state
        state = run(state)
        return state

    return kernel_times(once, _PROFILED, plan.kernels)


def _row(
    name: str,
    found: _Measured,
    model: GptOss,
    plan: Plan,
    roofs: Roofs,
    say: Callable[[str], None],
) -> dict[str, Any]:
    ms = found.timing.us * 1e-3
    reading = found.cost.bytes / roofs.hbm_read_gbs * 1e-6
    arithmetic = found.cost.flops / roofs.bf16_tflops * 1e-9
    floor = max(reading, arithmetic)
    rate = found.tokens / ms * 1e3
    say(f"{name} {found.phase} batch {found.batch}, {found.context}: {rate:,.0f} tokens/s")
    return {
        "op": "gpt_oss",
        "model": name,
        "phase": found.phase,
        "batch": found.batch,
        "context": found.context,
        "tokens_per_s": float(f"{rate:.5g}"),
        "ms": round(ms, 4),
        "ms_min": round(found.timing.us_min * 1e-3, 4),
        "ms_max": round(found.timing.us_max * 1e-3, 4),
        "samples": found.timing.samples,
        "runs": found.timing.runs,
        "host_bound": found.timing.host_bound,
        "one_graph": found.one_graph,
        "cache_format": plan.cache_format,
        "dense_bytes": parameter_bytes(model.params)[0],
        "expert_bytes": parameter_bytes(model.params)[1],
        "floor_ms": float(f"{floor:.4g}"),
        "floor_by": "bytes" if reading >= arithmetic else "flops",
        "roof_fraction": float(f"{floor / ms:.4g}"),
        "peak_gb": _peak_gb(),
        "kernels": found.kernels,
    }


def _check_time(settings: Settings, what: str) -> None:
    if time.monotonic() > settings.deadline:
        raise OutOfTime(f"stopped before {what}")


def _require_finite(logits: Any, what: str) -> None:
    if not bool(jnp.isfinite(logits).all()):
        raise AssertionError(f"{what}: logits are not finite")


def _peak_gb() -> float | None:
    """The most device memory that this process has used so far, in 10^9 bytes; None on CPUs."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else round(stats["peak_bytes_in_use"] * 1e-9, 3)


def _memory_limit() -> float:
    stats = jax.devices()[0].memory_stats()
    return float("inf") if stats is None else stats["bytes_limit"]


def _decode_bytes(model: GptOss, batch: int, context: int, plan: Plan) -> int:
    """Bytes of parameters and cache, and of logits and what surrounds them."""
    cache = jax.eval_shape(lambda: model.init_cache(batch, context + _ROOM, plan.cache_format))
    logits = 4 * batch * model.config.vocab_size
    return sum(parameter_bytes(model.params)) + cache.nbytes + 4 * logits

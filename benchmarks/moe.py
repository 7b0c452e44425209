"""Times the GPT-OSS expert layer: routing given, grouping by expert included."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chain import compile_chain
from check import WrongResult, decode, spread
from jax import Array
from matmul import OutOfTime, Settings
from roofs import Roofs
from shapes import calls_of, copies_of, floor_us
from timing import measure

import jax_mxfp4 as mx
from jax_mxfp4.ops import Implementation

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
EXPERTS = (32, 128)
TOP_K = 4

# Experts that the tokens of other implementations' measurements used (H100, 2026-11-22), all of
# them with more tokens: a draw with fewer would read fewer weights and could not be compared.
_PEERS_ACTIVE = {
    32: {1: 4, 2: 7, 4: 13, 8: 21, 16: 28},
    128: {1: 4, 2: 8, 4: 16, 8: 29, 16: 51, 32: 81, 64: 111},
}
_DRAWS = 64
_CHECKED_TOKENS = 2
# bfloat16 rounds the hidden activations and the result, each by at most 2^-9 of their size.
_TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class Layer:
    """Sizes of an expert layer: D, I and E."""

    width: int = 2880
    intermediate: int = 2880
    experts: int = 32

    @property
    def expert_bytes(self) -> int:
        """Packed bytes of one expert, with biases in bfloat16."""
        elements = 3 * self.width * self.intermediate
        return elements * 17 // 32 + 2 * (2 * self.intermediate + self.width)

    def moved_bytes(self, tokens: int, active: int) -> int:
        """Bytes of the experts in use and of bfloat16 tokens, in and out."""
        return active * self.expert_bytes + 4 * tokens * self.width

    def flops(self, tokens: int) -> int:
        """Operations of both products for all pairs of token and expert."""
        return 6 * tokens * TOP_K * self.width * self.intermediate


def routing(layer: Layer, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T, k] and weights float32 [T, k] of independent normal logits.

    Of the first 64 draws it is the one whose number of experts in use is nearest to that of other
    measurements, `_PEERS_ACTIVE`, and not below it; if none is, the first that is not. The first
    draw where there is nothing to compare with.
    """
    peers = _PEERS_ACTIVE.get(layer.experts, {tokens: 0})
    wanted = peers.get(tokens, layer.experts if tokens > max(peers) else 0)
    nearest: tuple[int, np.ndarray, np.ndarray] | None = None
    for seed in itertools.count():
        logits = np.random.default_rng(seed).standard_normal((tokens, layer.experts))
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K].astype(np.int32)
        active = len(np.unique(ids))
        if active >= wanted and (nearest is None or active < nearest[0]):
            nearest = active, logits, ids
        if nearest and (nearest[0] == wanted or not wanted or seed + 1 >= _DRAWS):
            break
    assert nearest
    _, logits, ids = nearest
    chosen = np.exp(np.take_along_axis(logits, ids, axis=1))
    return ids, (chosen / chosen.sum(axis=1, keepdims=True)).astype(np.float32)


# gate_up and its bias, down and its bias.
Weights = tuple[mx.MXFP4Array, Array, mx.MXFP4Array, Array]


def random_layers(layer: Layer, count: int) -> list[Weights]:
    """Weights on the device; packed ones are prepared, once and before anything is timed."""

    @partial(jax.jit, static_argnums=1)
    def packed(key: Array, shape: tuple[int, ...]) -> mx.MXFP4Array:
        to_blocks, to_scales = jax.random.split(key)
        groups = (*shape[:-1], shape[-1] // 32)
        blocks = jax.random.bits(to_blocks, (*groups, 16), jnp.uint8)
        scales = 120 + jax.random.bits(to_scales, groups, jnp.uint8) % np.uint8(3)
        return mx.prepare(mx.MXFP4Array(blocks, scales))

    experts, width, inner = layer.experts, layer.width, layer.intermediate
    layers = []
    for index in range(count):
        keys = jax.random.split(jax.random.key(index, impl="rbg"), 4)
        biases = (
            jax.random.normal(key, (experts, size), jnp.bfloat16)
            for key, size in zip(keys[2:], (2 * inner, width), strict=True)
        )
        first, second = biases
        gate_up = packed(keys[0], (experts, 2 * inner, width))
        down = packed(keys[1], (experts, width, inner))
        layers.append((gate_up, first, down, second))
    return layers


def moe(implementation: Implementation, x: tuple[Array, ...], w: Weights) -> Array:
    """`jax_mxfp4.moe` of x = (tokens, ids, weights) and one of `random_layers`."""
    return mx.moe(*x, *w, implementation=implementation)


def measure_layer(
    layer: Layer,
    tokens: Sequence[int],
    roofs: Roofs,
    settings: Settings,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """One row for each number of tokens.

    Raises:
      WrongResult: the layer does not compute what it should.
      OutOfTime: the deadline is over.
    """
    implementation: Implementation = None if jax.default_backend() == "cpu" else "cuda"
    routes = {count: routing(layer, count) for count in tokens}
    actives = {count: len(np.unique(ids)) for count, (ids, _) in routes.items()}
    # Enough layers that the experts in use do not stay in a cache.
    rotations = {
        count: copies_of(active * layer.expert_bytes, settings.rotation_bytes)
        for count, active in actives.items()
    }
    layers = random_layers(layer, max(rotations.values()))
    for count in tokens:
        if time.monotonic() > settings.deadline:
            raise OutOfTime(f"stopped before {layer.experts} experts, {count} tokens")
        weights = tuple(layers[: rotations[count]])
        hidden = jax.random.normal(jax.random.key(1), (count, layer.width), jnp.bfloat16)
        x = (hidden, *map(jnp.asarray, routes[count]))
        moved = layer.moved_bytes(count, actives[count])
        flops = layer.flops(count)
        floor = floor_us(moved, flops, roofs.hbm_read_gbs, roofs.bf16_tflops)
        calls = calls_of(len(weights), floor, settings.calls)
        chain = compile_chain(partial(moe, implementation), x, weights, calls)

        state = chain.run(chain.fresh_state(), x, weights)
        _check(layer, state, x, weights, calls)
        timing, _ = measure(
            lambda s, run=chain.run, x=x, weights=weights: run(s, x, weights),
            state,
            calls,
            samples=settings.samples,
        )
        notes = "  NOT IN ONE GRAPH" if chain.one_graph is False else ""
        say(f"{layer.experts} experts, {count} tokens: {timing.us:.2f} us{notes}")
        yield {
            "op": "moe",
            "experts": layer.experts,
            "tokens": count,
            "impl": "jax_mxfp4",
            "active_experts": actives[count],
            "D": layer.width,
            "I": layer.intermediate,
            **{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(timing).items()},
            "calls": calls,
            "copies": len(weights),
            "one_graph": chain.one_graph,
            "kernels": chain.kernels,
            "floor_us": round(floor, 3),
            "gbs": round(moved / timing.us * 1e-3, 1),
            "tflops": float(f"{flops / timing.us * 1e-6:.4g}"),
            "roof_fraction": float(f"{floor / timing.us:.4g}"),
        }


def _check(
    layer: Layer,
    state: tuple[Array, Array],
    x: tuple[Array, ...],
    weights: Sequence[Weights],
    calls: int,
) -> None:
    """Compare some tokens of the last call with float64, and the first element of all calls."""
    what = f"moe of {layer.experts} experts, {x[0].shape[0]} tokens"
    samples = np.asarray(state[0]).astype(np.float64)
    first = samples[np.arange(calls) % len(weights)]
    if not np.isfinite(samples).all() or not np.array_equal(samples, first):
        raise WrongResult(f"{what}: calls with the same weights differ, or are not finite")
    w = weights[(calls - 1) % len(weights)]
    for token in spread(x[0].shape[0], _CHECKED_TOKENS):
        expected = _one_token(*(np.asarray(part[token]) for part in x), w)
        off = np.linalg.norm(np.asarray(state[1][token]).astype(np.float64) - expected)
        if not off <= _TOLERANCE * np.linalg.norm(expected):
            error = off / np.linalg.norm(expected)
            raise WrongResult(f"{what}: token {token} is off by {error:.1e} of its norm")


def _one_token(x: np.ndarray, ids: np.ndarray, shares: np.ndarray, w: Weights) -> np.ndarray:
    total = np.zeros(x.shape, np.float64)
    for expert, share in zip(ids, shares.astype(np.float64), strict=True):
        gate_up, gate_up_bias, down, down_bias = (part[expert] for part in w)
        gu = decode(gate_up) @ x.astype(np.float64) + np.asarray(gate_up_bias, np.float64)
        gate, up = np.minimum(gu[0::2], 7.0), np.clip(gu[1::2], -7.0, 7.0)
        hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        total += share * (decode(down) @ hidden + np.asarray(down_bias, np.float64))
    return total

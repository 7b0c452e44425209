"""Autoregressive generation with a key-value cache.

One compiled program makes one token of every sequence: the forward pass, the choice of the tokens
and whether a sequence has ended all stay on the device, and what changes from step to step is
donated, so that on GPUs the program can be replayed as one CUDA graph. The host launches steps
ahead of the tokens it reads.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_mxfp4.models.gpt_oss import forward, sampling
from jax_mxfp4.models.gpt_oss.cache import KVCache, grow
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.models.gpt_oss.kv_formats import CacheFormat
from jax_mxfp4.models.gpt_oss.modeling import GptOss
from jax_mxfp4.models.gpt_oss.params import Params
from jax_mxfp4.ops import Implementation

Prompts = Sequence[Sequence[int]] | Sequence[int] | np.ndarray | jax.Array
Stream = Callable[[list[int | None]], None]

_SMALLEST_BUCKET = 16
# Sequences get a cache of this size first, which doubles when they fill it: a step takes time for
# all of the cache, and every size is a program of its own.
_FIRST_CACHE = 1024
# Prompts are processed in chunks of so many tokens of all sequences together, which bounds the
# memory for activations: 0.7 GB for gpt-oss-20b in XLA's plan for an H100.
_CHUNK_TOKENS = 8192
# How many steps are launched before the tokens of one are read: more than enough to hide the way
# to the device, few enough to waste when a sequence ends.
_AHEAD = 4
_ENDED = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class State:
    """What one step of generation hands to the next.

    Attributes:
      tokens: int32 [B], chosen last.
      shown: int32 [B], the same, or -1 where the sequence had ended before.
      ended: bool [B].
      cache: of all positions before `tokens`.
    """

    tokens: jax.Array
    shown: jax.Array
    ended: jax.Array
    cache: KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Options:
    """How tokens are chosen.

    Attributes:
      keys: one key for each sequence [B].
      temperature: float32 scalar; None takes the most likely token.
      top_p: float32 scalar; None takes all tokens into account.
      eos_ids: int32 [any], the tokens that end a sequence.
    """

    keys: jax.Array
    temperature: jax.Array | None
    top_p: jax.Array | None
    eos_ids: jax.Array


def generate(
    model: GptOss,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_ids: Iterable[int] | None = None,
    cache_format: CacheFormat = None,
    stream: Stream | None = None,
) -> list[list[int]]:
    """Continue one or more prompts.

    Prompts of any lengths can share a batch. Lengths are rounded up to powers of two inside, so
    that later calls mostly find their programs compiled. What a sequence becomes depends on its
    prompt, its place in the batch and `key`; the other sequences touch it through rounding only.

    Args:
      model: a GPT-OSS model.
      tokens: one prompt, or a sequence of prompts, of token ids; integers [T] or [B, T] too.
      max_new_tokens: how many tokens to add at most, at least 1.
      temperature: 0 takes the most likely token each time; above 0 tokens are drawn from
        softmax(logits / temperature).
      top_p: draw from the smallest set of most likely tokens with this much probability, (0, 1].
      key: from `jax.random.key`; needed where temperature is above 0.
      eos_ids: a sequence ends with the first of these; default the model's own, () for none.
      cache_format: how keys and values are stored, see `GptOss.init_cache`.
      stream: called for each step, some steps after it was launched, with one entry per sequence:
        its new token, or None where it has ended.

    Returns:
      The new tokens of each prompt, without the prompt, with the token that ended it.

    Raises:
      TypeError: token ids are no integers.
      ValueError: no prompt, an empty prompt, ids outside the vocabulary, a sequence that would be
        longer than the model supports, or options outside their range.
    """
    prompts = _prompts(tokens, model.config)
    lengths = [len(prompt) for prompt in prompts]
    _check_options(max_new_tokens, temperature, top_p, key)
    longest = max(lengths) + max_new_tokens
    limit = model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"max_new_tokens: expected at most {limit - max(lengths)} after a prompt of "
            f"{max(lengths)} tokens, because the model supports {limit}, found {max_new_tokens}"
        )
    ends = model.config.eos_token_ids if eos_ids is None else tuple(eos_ids)
    keys = _row_keys(jax.random.key(0) if key is None else key, len(prompts))
    options = Options(
        keys,
        jnp.float32(temperature) if temperature > 0 else None,
        jnp.float32(top_p) if temperature > 0 and top_p < 1 else None,
        jnp.asarray(ends, jnp.int32),
    )
    largest = _bucket(longest, limit)
    first = min(largest, max(_FIRST_CACHE, _bucket(max(lengths), limit)))
    cache = model.init_cache(len(prompts), first, cache_format)
    logits, cache = _prefill(model, prompts, cache)
    state = start(logits, cache, options)

    outputs: list[list[int]] = [[] for _ in prompts]
    for shown in _steps(model, state, options, max(lengths), max_new_tokens, largest):
        new = [None if token == _ENDED else token for token in shown.tolist()]
        if all(token is None for token in new):
            break
        for output, token in zip(outputs, new, strict=True):
            if token is not None:
                output.append(token)
        if stream is not None:
            stream(new)
    return outputs


def _prefill(
    model: GptOss, prompts: Sequence[np.ndarray], cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Return the logits after each prompt and the filled cache."""
    lengths = [len(prompt) for prompt in prompts]
    share = max(_SMALLEST_BUCKET, _CHUNK_TOKENS // len(prompts))
    chunk = 1 << (share.bit_length() - 1)
    size = _bucket(max(lengths), chunk)  # of one chunk, where that is enough
    size = min(-(-max(lengths) // size) * size, cache.max_len)
    padded = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return model.prefill(padded, np.array(lengths), cache, chunk_size=chunk)


def _steps(
    model: GptOss, state: State, options: Options, length: int, count: int, largest: int
) -> Iterator[np.ndarray]:
    """Return the tokens of `count` steps, int32 [B] each, while later steps are under way.

    Args:
      model: a GPT-OSS model.
      state: after the first step.
      options: how tokens are chosen.
      length: of the longest prompt.
      count: how many steps, the first included.
      largest: how far the cache may grow.
    """
    waiting: deque[jax.Array] = deque()
    for step in range(count):
        if step:
            if length + step > state.cache.max_len:
                size = min(2 * state.cache.max_len, largest)
                state = replace(state, cache=_grow(model.config, state.cache, size))
            state = advance(
                model.params,
                state,
                options,
                config=model.config,
                implementation=model.implementation,
            )
        shown = jnp.copy(state.shown)  # the next step takes over the memory of the state
        shown.copy_to_host_async()
        waiting.append(shown)
        if len(waiting) > _AHEAD:
            yield np.asarray(waiting.popleft())
    yield from map(np.asarray, waiting)


@partial(jax.jit, donate_argnames="cache")
def start(logits: jax.Array, cache: KVCache, options: Options) -> State:
    """Choose the first token of each sequence from the logits after its prompt."""
    return _choose(logits, cache, jnp.zeros(logits.shape[0], bool), options)


@partial(
    jax.jit,
    static_argnames=("config", "implementation"),
    donate_argnames="state",
    # state.shown is not read; its memory is for the new one, so that no address ever changes.
    keep_unused=True,
)
def advance(
    params: Params,
    state: State,
    options: Options,
    *,
    config: GptOssConfig,
    implementation: Implementation,
) -> State:
    """Process the tokens chosen last and choose the next; see `forward.decode_step`."""
    logits, cache = forward.decode_step(
        params,
        state.tokens,
        state.cache,
        config=config,
        implementation=implementation,
    )
    return _choose(logits, cache, state.ended, options)


def _choose(logits: jax.Array, cache: KVCache, ended: jax.Array, options: Options) -> State:
    if options.temperature is None:
        tokens = sampling.greedy(logits)
    else:
        # One draw per position and row, whatever the padding and the batch.
        keys = jax.vmap(jax.random.fold_in)(options.keys, cache.lengths)
        tokens = sampling.sample(logits, keys, options.temperature, options.top_p)
    is_end = (tokens[:, None] == options.eos_ids).any(axis=1)
    shown = jnp.where(ended, np.int32(_ENDED), tokens)
    return State(tokens, shown, ended | is_end, cache)


_grow = jax.jit(grow, static_argnums=(0, 2))


@partial(jax.jit, static_argnames="batch")
def _row_keys(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))


def _bucket(length: int, limit: int) -> int:
    """Return the power of two that programs for this length are compiled for."""
    size = _SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, limit)


def _check_options(
    max_new_tokens: int, temperature: float, top_p: float, key: jax.Array | None
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: expected 0 or a positive number, found {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected above 0 and at most 1, found {top_p}")
    if temperature > 0 and key is None:
        raise ValueError("key: expected a jax.random.key where temperature is above 0, found None")


def _prompts(tokens: Prompts, config: GptOssConfig) -> list[np.ndarray]:
    """Return each prompt as a NumPy vector, checked."""
    if not isinstance(tokens, Sequence | np.ndarray | jax.Array):
        raise TypeError(f"tokens: expected prompts, found {type(tokens).__name__}")
    rows = list(np.asarray(tokens) if isinstance(tokens, jax.Array) else tokens)
    if rows and np.ndim(rows[0]) == 0:
        rows = [rows]
    if not rows:
        raise ValueError("tokens: expected at least one prompt, found none")
    prompts = [np.asarray(row) for row in rows]
    for index, prompt in enumerate(prompts):
        if prompt.ndim != 1 or not prompt.size:
            raise ValueError(
                f"tokens: expected prompts of at least one token, found shape "
                f"{list(prompt.shape)} for prompt {index}"
            )
        if not np.issubdtype(prompt.dtype, np.integer):
            raise TypeError(f"tokens: expected integers, found {prompt.dtype}")
        outside = prompt[(prompt < 0) | (prompt >= config.vocab_size)]
        if outside.size:
            raise ValueError(
                f"tokens: expected ids from 0 to {config.vocab_size - 1}, found {outside[0]}"
            )
    return prompts

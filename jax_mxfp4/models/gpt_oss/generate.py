"""Autoregressive generation with a key-value cache."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_mxfp4.models.gpt_oss import forward, sampling
from jax_mxfp4.models.gpt_oss.cache import KVCache, init_cache
from jax_mxfp4.models.gpt_oss.config import GptOssConfig
from jax_mxfp4.models.gpt_oss.modeling import GptOss
from jax_mxfp4.models.gpt_oss.params import Params
from jax_mxfp4.ops import Implementation

Prompts = Sequence[Sequence[int]] | Sequence[int] | np.ndarray | jax.Array
Stream = Callable[[list[int | None]], None]

_SMALLEST_BUCKET = 16


def generate(
    model: GptOss,
    tokens: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos_ids: Iterable[int] | None = None,
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
      stream: called after each step with one entry per sequence, its new token or None where it
        has ended.

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
    ends = frozenset(model.config.eos_token_ids if eos_ids is None else eos_ids)

    padded = np.zeros((len(prompts), _bucket(max(lengths), limit)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    # Greedy steps do not use the key.
    keys = _row_keys(jax.random.key(0) if key is None else key, len(prompts))
    options = (keys, jnp.float32(temperature), jnp.float32(top_p))
    static = {
        "config": model.config,
        "implementation": model.implementation,
        "greedy": temperature == 0,
    }
    cache = init_cache(model.config, len(prompts), _bucket(longest, limit), model.dtype)
    current, cache = _start(
        model.params, padded, np.asarray(lengths, np.int32), cache, options, **static
    )
    outputs: list[list[int]] = [[] for _ in prompts]
    active = [True] * len(prompts)
    for step in range(max_new_tokens):
        new: list[int | None] = [None] * len(prompts)
        for row, token in enumerate(np.asarray(current).tolist()):
            if active[row]:
                outputs[row].append(token)
                new[row] = token
                active[row] = token not in ends
        if stream is not None:
            stream(new)
        if not any(active) or step + 1 == max_new_tokens:
            break
        current, cache = _step(model.params, current, cache, options, **static)
    return outputs


def _choose(
    logits: jax.Array,
    lengths: jax.Array,
    options: tuple[jax.Array, jax.Array, jax.Array],
    greedy: bool,
) -> jax.Array:
    if greedy:
        return sampling.greedy(logits)
    keys, temperature, top_p = options
    # One draw per position and row, whatever the padding and the batch.
    return sampling.sample(logits, jax.vmap(jax.random.fold_in)(keys, lengths), temperature, top_p)


# The cache is donated: a step writes into the memory of the one before.
_compiled = partial(
    jax.jit, static_argnames=("config", "implementation", "greedy"), donate_argnames="cache"
)


@_compiled
def _start(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: KVCache,
    options: tuple[jax.Array, jax.Array, jax.Array],
    *,
    config: GptOssConfig,
    implementation: Implementation,
    greedy: bool,
) -> tuple[jax.Array, KVCache]:
    """Process the prompts and choose the first new token of each."""
    logits, cache = forward.prefill(
        params, tokens, lengths, cache, config=config, implementation=implementation
    )
    return _choose(logits, cache.lengths, options, greedy), cache


@_compiled
def _step(
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    options: tuple[jax.Array, jax.Array, jax.Array],
    *,
    config: GptOssConfig,
    implementation: Implementation,
    greedy: bool,
) -> tuple[jax.Array, KVCache]:
    """Process the tokens chosen last and choose the next."""
    logits, cache = forward.decode_step(
        params, tokens, cache, config=config, implementation=implementation
    )
    return _choose(logits, cache.lengths, options, greedy), cache


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

"""The least that a GPT-OSS model must read and compute, from its configuration."""

import math
from dataclasses import dataclass
from typing import Any

import jax

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.models.gpt_oss import GptOssConfig, Params

_DENSE = 2  # bytes of an element in bfloat16


@dataclass(frozen=True)
class Cost:
    """Bytes that are read or written at least once, and operations (an addition is one)."""

    bytes: float
    flops: float


def parameter_bytes(params: Params) -> tuple[int, int]:
    """Bytes of all dense arrays and of all packed ones."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, MXFP4Array))
    packed = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, MXFP4Array))
    dense = [leaf for leaf in leaves if not isinstance(leaf, MXFP4Array)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in dense), packed


def expected_experts(config: GptOssConfig, tokens: int) -> float:
    """How many experts of a layer `tokens` independent tokens use, where all are equally likely."""
    unused = (1 - config.experts_per_token / config.num_experts) ** tokens
    return config.num_experts * (1 - unused)


def decode_cost(config: GptOssConfig, batch: int, context: int, cache_format: Any) -> Cost:
    """Of one token for each of `batch` sequences that have `context` positions."""
    expert = 3 * config.hidden_size * config.intermediate_size
    experts = expected_experts(config, batch) * (expert * 17 / 32)
    unembedding = config.vocab_size * config.hidden_size
    seen = sum(_seen(config, context))
    row = 2 * config.num_key_value_heads * _row_bytes(config, cache_format)
    weights = config.num_layers * (_DENSE * _dense_of_layer(config) + experts)
    moved = weights + _DENSE * unembedding + batch * seen * row
    per_token = 2 * (config.num_layers * _active_of_layer(config) + unembedding)
    attention = 4 * config.num_attention_heads * config.head_dim * seen
    return Cost(moved, batch * (per_token + attention))


def prefill_cost(config: GptOssConfig, length: int) -> Cost:
    """Of one prompt, with the logits of its last position."""
    expert = 3 * config.hidden_size * config.intermediate_size
    experts = expected_experts(config, length) * (expert * 17 / 32)
    unembedding = config.vocab_size * config.hidden_size
    weights = config.num_layers * (_DENSE * _dense_of_layer(config) + experts)
    pairs = sum(seen * (length - seen) + seen * (seen + 1) / 2 for seen in _seen(config, length))
    attention = 4 * config.num_attention_heads * config.head_dim * pairs
    dense = 2 * (length * config.num_layers * _active_of_layer(config) + unembedding)
    return Cost(weights + _DENSE * unembedding, dense + attention)


def _seen(config: GptOssConfig, positions: int) -> list[int]:
    """How many keys the last query of each layer sees."""
    return [
        min(positions, config.sliding_window) if kind == "sliding_attention" else positions
        for kind in config.layer_types
    ]


def _dense_of_layer(config: GptOssConfig) -> int:
    """Elements of the dense matrices of a layer: q, k, v, out and the router."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * (heads * config.head_dim + config.num_experts)


def _active_of_layer(config: GptOssConfig) -> int:
    expert = 3 * config.hidden_size * config.intermediate_size
    return _dense_of_layer(config) + config.experts_per_token * expert


def _row_bytes(config: GptOssConfig, cache_format: Any) -> int:
    """Bytes of one head's key or value of one position."""
    blocks = math.ceil(config.head_dim / 32)
    return {None: 2 * config.head_dim, "fp8": config.head_dim + 1, "mxfp4": 17 * blocks}[
        cache_format
    ]

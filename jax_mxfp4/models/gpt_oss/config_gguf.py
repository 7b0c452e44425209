"""The hyperparameters that the metadata of a GGUF file gives.

Keys from the `gguf` package's constants for the architecture `gpt-oss`. What they do not carry is
as in the released models: the sliding layers come first and alternate with the full ones, SwiGLU
has the constants 1.702 and 7, and the ends of the YaRN ramp are not rounded (llama.cpp rounds them
in all models, which changes the logits; the released configurations say not to).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.models.gpt_oss.config import GptOssConfig, LayerType, YarnScaling
from jax_mxfp4.models.gpt_oss.config_keys import (
    HARMONY_EOS_TOKEN_IDS,
    HARMONY_VOCAB_SIZE,
    Keys,
    alternating_layers,
    count_layers,
    yarn_scaling,
)

# A file that was converted by this package also carries the configuration it was made from, as
# text: the keys above are float32 and do not say everything.
CARRIED_CONFIG = "jax_mxfp4.config.json"
CARRIED_GENERATION_CONFIG = "jax_mxfp4.generation_config.json"

_ARCHITECTURE = "gpt-oss"
_ALWAYS_IN_METADATA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "num_experts", "experts_per_token", "sliding_window"),
    *("rms_norm_eps", "rope_theta", "max_position_embeddings"),
)
_PATTERN = "attention.sliding_window_pattern"
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_LONGEST_SHOWN = 80


def gguf_arguments(metadata: Mapping[str, Any], vocab_size: int | None) -> tuple[dict, list[str]]:
    """Return the arguments of `GptOssConfig` and what is wrong with `metadata`.

    Args:
      metadata: see `jax_mxfp4.checkpoints.GgufFile`.
      vocab_size: rows of the embedding, for files that do not have the key; None if unknown.
    """
    shown = {key: _shown(value) for key, value in metadata.items()}
    general = Keys(shown)
    if general.get("general.architecture", str) != _ARCHITECTURE and not general.problems:
        found = shown["general.architecture"]
        general.add("general.architecture", f"expected {_ARCHITECTURE!r}, found {found!r}")
    if general.problems:
        return {}, general.problems
    prefix = f"{_ARCHITECTURE}."
    keys = Keys(
        {key[len(prefix) :]: value for key, value in shown.items() if key.startswith(prefix)},
        prefix,
    )
    head_dim = keys.get("attention.key_length", int)
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.expect(key, head_dim)
    inner = "expert_feed_forward_length"
    arguments = {
        "vocab_size": keys.get("vocab_size", int, vocab_size),
        "hidden_size": keys.get("embedding_length", int),
        "intermediate_size": keys.get(inner if inner in keys.data else "feed_forward_length", int),
        "num_attention_heads": keys.get("attention.head_count", int),
        "num_key_value_heads": keys.get("attention.head_count_kv", int),
        "head_dim": head_dim,
        "num_experts": keys.get("expert_count", int),
        "experts_per_token": keys.get("expert_used_count", int),
        "layer_types": _layer_types(keys, metadata.get(f"{prefix}{_PATTERN}")),
        "sliding_window": keys.get("attention.sliding_window", int),
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": keys.get("rope.freq_base", float),
        "rope_scaling": _rope_scaling(keys),
        "max_position_embeddings": keys.get("context_length", int),
    }
    if arguments["vocab_size"] is None:
        keys.add("vocab_size", "missing, and so is tensor 'token_embd.weight'")
    arguments["eos_token_ids"] = _eos_token_ids(Keys(shown), keys, arguments["vocab_size"])
    return arguments, keys.problems


def require_agreement(file: Path, config: GptOssConfig, carried: GptOssConfig) -> None:
    """Refuse a file whose metadata was edited after the configuration it carries was written.

    Raises:
      CheckpointError: lists the values of `config`, from the metadata, that differ in `carried`.
    """
    left, right = _comparable(config), _comparable(carried)
    problems = [
        f"{name}: {left[name]!r}, but {right[name]!r} in {CARRIED_CONFIG!r}"
        for name in left
        if left[name] != right[name]
    ]
    if problems:
        raise CheckpointError(file, problems)


def _comparable(config: GptOssConfig) -> dict[str, Any]:
    """Return the values that metadata always has, floats rounded as there."""
    scaling = config.rope_scaling
    values = {
        **{name: getattr(config, name) for name in _ALWAYS_IN_METADATA},
        "layers": config.num_layers,
        "rope_scaling.factor": scaling and scaling.factor,
        "rope_scaling.original_max_position_embeddings": (
            scaling and scaling.original_max_position_embeddings
        ),
    }
    return {
        name: float(np.float32(value)) if isinstance(value, float) else value
        for name, value in values.items()
    }


def _shown(value: Any) -> Any:
    """Return what error messages are to show of a value, which can be huge."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "..."
    return f"an array of {len(value)}"


def _layer_types(keys: Keys, pattern: Any) -> tuple[LayerType, ...]:
    """Return each layer's kind: `pattern` says which are sliding, or that every n-th is not."""
    count = count_layers(keys, "block_count")
    if pattern is None:
        return alternating_layers(count)
    if type(pattern) is int and pattern > 0:
        sliding = [(i + 1) % pattern != 0 for i in range(count)]
    elif isinstance(pattern, np.ndarray) and pattern.dtype == bool and len(pattern) == count:
        sliding = pattern.tolist()
    else:
        expected = f"a positive number or {count} booleans"
        keys.add(_PATTERN, f"expected {expected}, found {_shown(pattern)!r}")
        return ()
    return tuple("sliding_attention" if is_sliding else "full_attention" for is_sliding in sliding)


def _rope_scaling(keys: Keys) -> YarnScaling | None:
    kind = keys.get("rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind != "yarn":
        keys.add("rope.scaling.type", f"expected 'yarn' or 'none', found {kind!r}")
        return None
    keys.expect("rope.scaling.attn_factor", 1.0)
    keys.expect("rope.scaling.yarn_ext_factor", 1.0)
    keys.expect("rope.scaling.yarn_attn_factor", 1.0)
    return yarn_scaling(
        keys,
        factor=keys.get("rope.scaling.factor", float),
        original_max_position_embeddings=keys.get("rope.scaling.original_context_length", int),
        beta_fast=keys.get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=keys.get("rope.scaling.yarn_beta_slow", float, 1.0),
        truncate=False,
    )


def _eos_token_ids(tokenizer: Keys, keys: Keys, vocab_size: int | None) -> tuple[int, ...]:
    """Return the ids that end a generation; converters leave out some of the released models'."""
    found = [tokenizer.get(f"tokenizer.ggml.{name}", int, None) for name in _END_TOKENS]
    keys.problems += tokenizer.problems
    known = HARMONY_EOS_TOKEN_IDS if vocab_size == HARMONY_VOCAB_SIZE else ()
    return tuple(dict.fromkeys(i for i in (*found, *known) if i is not None))

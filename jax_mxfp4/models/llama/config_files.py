"""The hyperparameters that the metadata of a GGUF file or a config.json gives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.models.gpt_oss.config_keys import Keys, count_layers
from jax_mxfp4.models.llama.config import LlamaConfig

_ARCHITECTURE = "llama"


def config_from_gguf(
    path: Path, metadata: Mapping[str, Any], *, tie_embeddings: bool
) -> LlamaConfig:
    """Return the configuration that the metadata of the GGUF file `path` gives.

    Args:
      path: named in errors.
      metadata: see `jax_mxfp4.checkpoints.GgufFile`.
      tie_embeddings: whether the file has no output layer of its own.

    Raises:
      CheckpointError: another architecture, keys that are missing or malformed, or a kind of
        rotary embedding that is not implemented.
    """
    found = metadata.get("general.architecture")
    if found != _ARCHITECTURE:
        raise CheckpointError(
            path, f"'general.architecture': expected {_ARCHITECTURE!r}, found {found!r}"
        )
    prefix = f"{_ARCHITECTURE}."
    keys = Keys(
        {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)},
        prefix,
    )
    hidden = keys.get("embedding_length", int)
    heads = keys.get("attention.head_count", int)
    default = hidden // heads if not keys.problems and heads > 0 else None
    head_dim = keys.get("attention.key_length", int, default)
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.expect(key, head_dim)
    keys.expect("rope.scaling.type", "none")
    keys.expect("expert_count", 0)
    vocabulary = metadata.get("tokenizer.ggml.tokens", ())
    arguments = {
        "vocab_size": keys.get("vocab_size", int, len(vocabulary)),
        "hidden_size": hidden,
        "intermediate_size": keys.get("feed_forward_length", int),
        "num_layers": count_layers(keys, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": keys.get("rope.freq_base", float, 10000.0),
        "max_position_embeddings": keys.get("context_length", int),
    }
    return _config(path, keys, arguments | {"tie_embeddings": tie_embeddings})


def config_from_folder(path: Path, data: Mapping[str, Any]) -> LlamaConfig:
    """Return the configuration that `data`, the config.json of the folder `path`, gives.

    Raises:
      CheckpointError: another architecture, keys that are missing or malformed, or an option that
        is not implemented.
    """
    file = path / "config.json"
    keys = Keys(data)
    if keys.get("model_type", str) != _ARCHITECTURE and not keys.problems:
        raise CheckpointError(
            file, f"'model_type': expected {_ARCHITECTURE!r}, found {data['model_type']!r}"
        )
    hidden = keys.get("hidden_size", int)
    heads = keys.get("num_attention_heads", int)
    default = hidden // heads if not keys.problems and heads > 0 else None
    keys.expect("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias"):
        keys.expect(key, False)
    arguments = {
        "vocab_size": keys.get("vocab_size", int),
        "hidden_size": hidden,
        "intermediate_size": keys.get("intermediate_size", int),
        "num_layers": count_layers(keys),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("num_key_value_heads", int, heads),
        "head_dim": keys.get("head_dim", int, default),
        "rms_norm_eps": keys.get("rms_norm_eps", float),
        "rope_theta": _rope_theta(keys),
        "max_position_embeddings": keys.get("max_position_embeddings", int),
        "tie_embeddings": keys.get("tie_word_embeddings", bool, False),
    }
    return _config(file, keys, arguments)


def _rope_theta(keys: Keys) -> float:
    """Return the base; transformers 5 keeps it in a section, older files at the top."""
    section = keys.section("rope_parameters")
    if section is not None:
        section.expect("rope_type", "default")
        return section.get("rope_theta", float)
    scaling = keys.section("rope_scaling")
    if scaling is not None:
        keys.add("rope_scaling", "expected none: context extension is not supported")
    return keys.get("rope_theta", float, 10000.0)


def _config(file: Path, keys: Keys, arguments: dict[str, Any]) -> LlamaConfig:
    if keys.problems:
        raise CheckpointError(file, keys.problems)
    try:
        return LlamaConfig(**arguments)
    except ValueError as error:
        raise CheckpointError(file, str(error).split("; ")) from error

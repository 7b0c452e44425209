"""Reading `GptOssConfig` from the two dialects of `config.json`, and from a GGUF file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mxfp4.checkpoints import (
    CheckpointError,
    GgufFile,
    is_gguf,
    parse_json_object,
    read_json_object,
    require_folder,
)
from jax_mxfp4.checkpoints.errors import shorten
from jax_mxfp4.models.gpt_oss.config import GptOssConfig, LayerType, YarnScaling
from jax_mxfp4.models.gpt_oss.config_gguf import (
    CARRIED_CONFIG,
    CARRIED_GENERATION_CONFIG,
    gguf_arguments,
    require_agreement,
)
from jax_mxfp4.models.gpt_oss.config_keys import (
    HARMONY_EOS_TOKEN_IDS,
    HARMONY_VOCAB_SIZE,
    INT32_MAX,
    Keys,
    alternating_layers,
    count_layers,
    yarn_scaling,
)


def read_config(path: str | Path) -> GptOssConfig:
    """Return the configuration of the checkpoint `path`, a folder or a GGUF file.

    `config.json` may be Hugging Face's, in the form of the release or of transformers 5
    (`rope_parameters`), or OpenAI's. The ids that end a generation come from
    `generation_config.json` where there is one, as in transformers. For GGUF files see
    `gguf_arguments`.

    Raises:
      CheckpointError: a file cannot be read or parsed, keys are missing or of a wrong type (all
        are listed), or the values describe something that this model does not implement.
    """
    path = Path(path)
    if is_gguf(path):
        return _read_gguf(path)
    require_folder(path)
    file = path / "config.json"
    data = read_json_object(file)
    if "num_local_experts" in data or "model_type" in data:
        generation_file = path / "generation_config.json"
        generation = read_json_object(generation_file) if generation_file.exists() else {}
        return _hugging_face_config(file, data, generation_file, generation)
    if "num_experts" in data:
        keys = Keys(data)
        return _build(file, _openai(keys), keys.problems)
    raise CheckpointError(
        file,
        "expected the keys of a GPT-OSS model, Hugging Face's ('model_type', "
        "'num_local_experts', ...) or OpenAI's ('num_experts', ...), found neither",
    )


def _read_gguf(path: Path) -> GptOssConfig:
    reader = GgufFile(path, strict=False)  # the tensors are for others to check
    embedding = reader.tensors.get("token_embd.weight")
    arguments, problems = gguf_arguments(reader.metadata, embedding.shape[0] if embedding else None)
    config = _build(path, arguments, problems)
    carried = reader.metadata.get(CARRIED_CONFIG)
    if carried is None:
        return config
    data, generation = (
        parse_json_object(path, reader.metadata.get(key, "{}"), f"metadata key {key!r}")
        for key in (CARRIED_CONFIG, CARRIED_GENERATION_CONFIG)
    )
    exact = _hugging_face_config(path, data, path, generation)
    require_agreement(path, config, exact)
    return exact


def _hugging_face_config(
    file: Path, data: Mapping[str, Any], generation_file: Path, generation: Mapping[str, Any]
) -> GptOssConfig:
    keys, eos = Keys(data), Keys(generation)
    arguments = _hugging_face(keys)
    arguments["eos_token_ids"] = _eos_token_ids(eos) or _eos_token_ids(keys)
    if eos.problems:
        raise CheckpointError(generation_file, eos.problems)
    return _build(file, arguments, keys.problems)


def _build(file: Path, arguments: dict[str, Any], problems: list[str]) -> GptOssConfig:
    if problems:
        raise CheckpointError(file, problems)
    try:
        return GptOssConfig(**arguments)
    except ValueError as error:
        raise CheckpointError(file, str(error).split("; ")) from error


def _hugging_face(keys: Keys) -> dict[str, Any]:
    """Map transformers' `GptOssConfig` keys to arguments of ours."""
    keys.expect("model_type", "gpt_oss")
    keys.expect("hidden_act", "silu")
    keys.expect("attention_bias", True)
    keys.expect("tie_word_embeddings", False)
    if quantization := keys.section("quantization_config"):
        quantization.expect("quant_method", "mxfp4")
    experts_key = "num_experts_per_tok"
    if keys.data.get(experts_key) is None:
        experts_key = "experts_per_token"
    rope = keys.section("rope_parameters") or keys.section("rope_scaling")
    theta_keys = rope if rope and rope.data.get("rope_theta") is not None else keys
    return {
        **_common(keys),
        "num_experts": keys.get("num_local_experts", int),
        "experts_per_token": keys.get(experts_key, int),
        "layer_types": _layer_types(keys),
        "rms_norm_eps": keys.get("rms_norm_eps", float, 1e-5),
        "rope_theta": theta_keys.get("rope_theta", float),
        "rope_scaling": _rope_scaling(rope) if rope else None,
        "max_position_embeddings": keys.get("max_position_embeddings", int, 131072),
        "swiglu_alpha": keys.get("swiglu_alpha", float, 1.702),
    }


def _openai(keys: Keys) -> dict[str, Any]:
    """Map the keys of OpenAI's `ModelConfig` (gpt_oss/torch/model.py) to arguments of ours."""
    context = keys.get("initial_context_length", int)
    factor = keys.get("rope_scaling_factor", float)
    arguments = {
        **_common(keys),
        "num_experts": keys.get("num_experts", int),
        "experts_per_token": keys.get("experts_per_token", int),
        "layer_types": alternating_layers(count_layers(keys)),
        "rope_theta": keys.get("rope_theta", float),
    }
    # OpenAI names the betas by what they bound: alpha is beta_slow, beta is beta_fast.
    beta_slow = keys.get("rope_ntk_alpha", float)
    beta_fast = keys.get("rope_ntk_beta", float)
    if isinstance(factor, float) and not 0 < factor < math.inf:
        keys.add("rope_scaling_factor", f"expected a number above 0, found {factor}")
    if not keys.problems:
        arguments["max_position_embeddings"] = int(min(context * max(factor, 1.0), INT32_MAX))
        if factor > 1:
            arguments["rope_scaling"] = yarn_scaling(
                keys,
                factor=factor,
                original_max_position_embeddings=context,
                beta_fast=beta_fast,
                beta_slow=beta_slow,
            )
        else:
            arguments["rope_scaling"] = None
        if arguments["vocab_size"] == HARMONY_VOCAB_SIZE:
            arguments["eos_token_ids"] = HARMONY_EOS_TOKEN_IDS
    return arguments


def _common(keys: Keys) -> dict[str, Any]:
    """Return the arguments whose keys both dialects share."""
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
    )
    return {
        **{size: keys.get(size, int) for size in sizes},
        "swiglu_limit": keys.get("swiglu_limit", float, 7.0),
    }


def _layer_types(keys: Keys) -> tuple[LayerType, ...]:
    num_layers = count_layers(keys)
    layer_types = keys.get("layer_types", list, None)
    if layer_types is None:
        return alternating_layers(num_layers)
    if not isinstance(layer_types, list):
        return ()
    if not all(isinstance(kind, str) for kind in layer_types):
        keys.add("layer_types", f"expected a list of strings, found {shorten(layer_types)}")
    elif num_layers and len(layer_types) != num_layers:
        keys.add("layer_types", f"expected {num_layers} entries, found {len(layer_types)}")
    return tuple(layer_types)


def _rope_scaling(rope: Keys) -> YarnScaling | None:
    # "type" is the older name of the same key.
    kind = rope.data.get("rope_type", rope.data.get("type"))
    if kind == "default":
        return None
    if kind != "yarn":
        rope.add("rope_type", f"expected 'yarn' or 'default', found {shorten(kind)}")
        return None
    for unsupported in ("mscale", "mscale_all_dim"):
        if rope.data.get(unsupported) is not None:
            rope.add(unsupported, f"not supported, found {shorten(rope.data[unsupported])}")
    return yarn_scaling(
        rope,
        factor=rope.get("factor", float),
        original_max_position_embeddings=rope.get("original_max_position_embeddings", int),
        beta_fast=rope.get("beta_fast", float, 32.0),
        beta_slow=rope.get("beta_slow", float, 1.0),
        # transformers truncates unless told otherwise; the released configurations tell it.
        truncate=rope.get("truncate", bool, True),
        attention_factor=rope.get("attention_factor", float, None),
    )


def _eos_token_ids(keys: Keys) -> tuple[int, ...]:
    """Return `eos_token_id`, which may be absent, one id or a list of ids."""
    value = keys.data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        keys.add("eos_token_id", f"expected int or a list of int, found {shorten(value)}")
        return ()
    return tuple(ids)

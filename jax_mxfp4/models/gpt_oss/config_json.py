"""Reading `GptOssConfig` from the two dialects of `config.json`: Hugging Face's and OpenAI's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mxfp4.checkpoints import CheckpointError, read_json_object, require_folder
from jax_mxfp4.models.gpt_oss.config import GptOssConfig, LayerType, YarnScaling

# The vocabulary of the released models, and the ids that end a generation there (their
# generation_config.json): <|return|>, <|endoftext|>, <|call|>. OpenAI's config.json has no ids.
_HARMONY_VOCAB_SIZE = 201088
_HARMONY_EOS_TOKEN_IDS = (200002, 199999, 200012)

# Sizes and positions are int32 in the model.
_INT32_MAX = 2**31 - 1
_MAX_LAYERS = 10_000

_REQUIRED: Any = object()


def read_config(folder: str | Path) -> GptOssConfig:
    """Return the configuration of the checkpoint in `folder`.

    `config.json` may be Hugging Face's, in the form of the release or of transformers 5
    (`rope_parameters`), or OpenAI's. The ids that end a generation come from
    `generation_config.json` where there is one, as in transformers.

    Raises:
      CheckpointError: a file cannot be read or parsed, keys are missing or of a wrong type (all
        are listed), or the values describe something that this model does not implement.
    """
    folder = Path(folder)
    require_folder(folder)
    file = folder / "config.json"
    data = read_json_object(file)
    if "num_local_experts" in data or "model_type" in data:
        generation_file = folder / "generation_config.json"
        generation = read_json_object(generation_file) if generation_file.exists() else {}
        keys = _Keys(data)
        arguments = _hugging_face(keys)
        eos = _Keys(generation)
        arguments["eos_token_ids"] = _eos_token_ids(eos) or _eos_token_ids(keys)
        if eos.problems:
            raise CheckpointError(generation_file, eos.problems)
    elif "num_experts" in data:
        keys = _Keys(data)
        arguments = _openai(keys)
    else:
        raise CheckpointError(
            file,
            "expected the keys of a GPT-OSS model, Hugging Face's ('model_type', "
            "'num_local_experts', ...) or OpenAI's ('num_experts', ...), found neither",
        )
    if keys.problems:
        raise CheckpointError(file, keys.problems)
    try:
        return GptOssConfig(**arguments)
    except ValueError as error:
        raise CheckpointError(file, str(error).split("; ")) from error


class _Keys:
    """Typed look-ups in a JSON object that remember every problem instead of raising the first."""

    def __init__(self, data: Mapping[str, Any], prefix: str = "") -> None:
        self.data = data
        self.prefix = prefix
        self.problems: list[str] = []

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return data[key], which must be of `kind`; `null` counts as absent."""
        value = self.data.get(key)
        if value is None:
            if default is _REQUIRED:
                self.add(key, f"missing, expected {kind.__name__}")
            # After a problem the values are never used.
            return default
        # Not isinstance: True must not pass for 1.
        if type(value) is int and abs(value) > _INT32_MAX:
            self.add(key, f"expected at most {_INT32_MAX}, found {value}")
        elif type(value) is int and kind is float:
            return float(value)
        elif type(value) is not kind:
            self.add(key, f"expected {kind.__name__}, found {value!r}")
        return value

    def expect(self, key: str, supported: Any) -> None:
        """Require that data[key], where present, has the one value that is implemented."""
        value = self.data.get(key)
        if value is not None and value != supported:
            self.add(key, f"expected {supported!r}, the only supported value, found {value!r}")

    def add(self, key: str, problem: str) -> None:
        """Record a problem with `key`."""
        self.problems.append(f"'{self.prefix}{key}': {problem}")

    def section(self, key: str) -> "_Keys | None":
        """Return the object under `key`, sharing this one's problems; None where it is absent."""
        value = self.get(key, dict, None)
        if not isinstance(value, dict):
            return None
        section = _Keys(value, f"{self.prefix}{key}.")
        section.problems = self.problems
        return section


def _hugging_face(keys: _Keys) -> dict[str, Any]:
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


def _openai(keys: _Keys) -> dict[str, Any]:
    """Map the keys of OpenAI's `ModelConfig` (gpt_oss/torch/model.py) to arguments of ours."""
    context = keys.get("initial_context_length", int)
    factor = keys.get("rope_scaling_factor", float)
    arguments = {
        **_common(keys),
        "num_experts": keys.get("num_experts", int),
        "experts_per_token": keys.get("experts_per_token", int),
        "layer_types": _alternating(_num_layers(keys)),
        "rope_theta": keys.get("rope_theta", float),
    }
    # OpenAI names the betas by what they bound: alpha is beta_slow, beta is beta_fast.
    beta_slow = keys.get("rope_ntk_alpha", float)
    beta_fast = keys.get("rope_ntk_beta", float)
    if not keys.problems:
        arguments["max_position_embeddings"] = int(min(context * max(factor, 1.0), _INT32_MAX))
        if factor > 1:
            arguments["rope_scaling"] = _yarn(
                keys,
                factor=factor,
                original_max_position_embeddings=context,
                beta_fast=beta_fast,
                beta_slow=beta_slow,
            )
        else:
            arguments["rope_scaling"] = None
        if arguments["vocab_size"] == _HARMONY_VOCAB_SIZE:
            arguments["eos_token_ids"] = _HARMONY_EOS_TOKEN_IDS
    return arguments


def _common(keys: _Keys) -> dict[str, Any]:
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


def _num_layers(keys: _Keys) -> int:
    """Return `num_hidden_layers`, or 0 after recording what is wrong with it."""
    value = keys.get("num_hidden_layers", int)
    if type(value) is not int:
        return 0
    if not 0 < value <= _MAX_LAYERS:
        keys.add("num_hidden_layers", f"expected 1 to {_MAX_LAYERS}, found {value}")
        return 0
    return value


def _alternating(num_layers: int) -> tuple[LayerType, ...]:
    """Return the released pattern: sliding, full, sliding, ..."""
    return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(num_layers))


def _layer_types(keys: _Keys) -> tuple[LayerType, ...]:
    num_layers = _num_layers(keys)
    layer_types = keys.get("layer_types", list, None)
    if layer_types is None:
        return _alternating(num_layers)
    if not isinstance(layer_types, list):
        return ()
    if not all(isinstance(kind, str) for kind in layer_types):
        keys.add("layer_types", f"expected a list of strings, found {layer_types!r}")
    elif num_layers and len(layer_types) != num_layers:
        keys.add("layer_types", f"expected {num_layers} entries, found {len(layer_types)}")
    return tuple(layer_types)


def _rope_scaling(rope: _Keys) -> YarnScaling | None:
    # "type" is the older name of the same key.
    kind = rope.data.get("rope_type", rope.data.get("type"))
    if kind == "default":
        return None
    if kind != "yarn":
        rope.add("rope_type", f"expected 'yarn' or 'default', found {kind!r}")
        return None
    for unsupported in ("mscale", "mscale_all_dim"):
        if rope.data.get(unsupported) is not None:
            rope.add(unsupported, f"not supported, found {rope.data[unsupported]!r}")
    return _yarn(
        rope,
        factor=rope.get("factor", float),
        original_max_position_embeddings=rope.get("original_max_position_embeddings", int),
        beta_fast=rope.get("beta_fast", float, 32.0),
        beta_slow=rope.get("beta_slow", float, 1.0),
        # transformers truncates unless told otherwise; the released configurations tell it.
        truncate=rope.get("truncate", bool, True),
        attention_factor=rope.get("attention_factor", float, None),
    )


def _yarn(keys: _Keys, **arguments: Any) -> YarnScaling | None:
    if keys.problems:
        return None
    try:
        return YarnScaling(**arguments)
    except ValueError as error:
        keys.problems += [f"{keys.prefix}{problem}" for problem in str(error).split("; ")]
        return None


def _eos_token_ids(keys: _Keys) -> tuple[int, ...]:
    """Return `eos_token_id`, which may be absent, one id or a list of ids."""
    value = keys.data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        keys.add("eos_token_id", f"expected int or a list of int, found {value!r}")
        return ()
    return tuple(ids)

"""The weights that models of the shape of Llama must have, by their configuration.

Names and shapes from transformers (`LlamaForCausalLM` and the models that are made like it).
"""

from collections.abc import Mapping
from typing import Any

from jax_mxfp4.checkpoints import CheckpointError, WeightsFolder
from jax_mxfp4.checkpoints.errors import shorten

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
# Far above any model; it keeps a hostile configuration from making millions of names.
_MAX_LAYERS = 10_000

Shape = tuple[int, ...]


def check_llama_shapes(weights: WeightsFolder) -> str | None:
    """Compare the weights of `weights` with what its configuration asks for.

    Returns:
      None, or a sentence saying why there is nothing to compare: it is of another type.

    Raises:
      CheckpointError: the configuration lacks a size; or weights are missing or misshapen, all of
        which are listed with the `problems` of `weights`. Further weights are none of its business.
    """
    model_type = weights.config.get("model_type")
    if model_type not in _MODEL_TYPES:
        if weights.problems:
            raise CheckpointError(weights.path, weights.problems)
        return f"shapes of a model of type {shorten(model_type)} against its configuration"
    sizes = _sizes(weights)
    needed, possible = _shapes(sizes, bool(weights.config.get("tie_word_embeddings", False)))
    problems = [
        f"tensor {name!r}: missing, expected {list(shape)}"
        for name, shape in needed.items()
        if name not in weights.specs
    ]
    problems += [
        f"tensor {name!r}: expected {list(shape)}, found {list(weights.specs[name].shape)}"
        for name, shape in {**needed, **possible}.items()
        if name in weights.specs and weights.specs[name].shape != shape
    ]
    problems += weights.problems
    if problems:
        raise CheckpointError(weights.path, problems)
    return None


def _sizes(weights: WeightsFolder) -> dict[str, int]:
    config = weights.config
    sizes: dict[str, Any] = {key: config.get(key) for key in _SIZES}
    for key, default in (
        ("num_key_value_heads", sizes["num_attention_heads"]),
        ("head_dim", None),
    ):
        sizes[key] = default if config.get(key) is None else config[key]
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if sizes["head_dim"] is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        sizes["head_dim"] = hidden // heads
    problems = [
        f"{key!r}: expected a whole number above 0, found {shorten(value)}"
        for key, value in sizes.items()
        if type(value) is not int or value < 1
    ]
    if not problems and sizes["num_hidden_layers"] > _MAX_LAYERS:
        problems.append(
            f"'num_hidden_layers': expected at most {_MAX_LAYERS}, "
            f"found {sizes['num_hidden_layers']}"
        )
    if problems:
        raise CheckpointError(weights.path / "config.json", problems)
    return sizes


def _shapes(sizes: Mapping[str, int], is_tied: bool) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return the shapes of weights that must be there, and of others that may be."""
    hidden, inner, vocabulary = (
        sizes[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    width = sizes["num_attention_heads"] * sizes["head_dim"]
    kv_width = sizes["num_key_value_heads"] * sizes["head_dim"]
    needed: dict[str, Shape] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    possible: dict[str, Shape] = {}
    (possible if is_tied else needed)["lm_head.weight"] = (vocabulary, hidden)
    linear = {
        "self_attn.q_proj": (width, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, width),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            needed[f"{prefix}{norm}.weight"] = (hidden,)
        for name, shape in linear.items():
            needed[f"{prefix}{name}.weight"] = shape
            possible[f"{prefix}{name}.bias"] = shape[:1]
    return needed, possible

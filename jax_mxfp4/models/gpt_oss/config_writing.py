"""`GptOssConfig` in the three dialects that `read_config` reads."""

from typing import Any

from jax_mxfp4.models.gpt_oss.config import GptOssConfig, YarnScaling

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "sliding_window", "swiglu_limit"),
)
_RELEASED_ALPHA = 1.702


def hugging_face_json(config: GptOssConfig) -> dict[str, Any]:
    """Return the content of Hugging Face's config.json, with the keys of the released models."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **{size: getattr(config, size) for size in _SIZES},
        **({} if config.swiglu_alpha == _RELEASED_ALPHA else {"swiglu_alpha": config.swiglu_alpha}),
        "num_hidden_layers": config.num_layers,
        "layer_types": list(config.layer_types),
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "experts_per_token": config.experts_per_token,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config.rope_scaling),
        "max_position_embeddings": config.max_position_embeddings,
        **({"eos_token_id": list(config.eos_token_ids)} if config.eos_token_ids else {}),
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


def openai_json(config: GptOssConfig) -> dict[str, Any]:
    """Return the content of OpenAI's config.json, which cannot express everything."""
    scaling = config.rope_scaling
    factor = scaling.factor if scaling else 1.0
    context = scaling.original_max_position_embeddings if scaling else None
    return {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        **{size: getattr(config, size) for size in _SIZES},
        "initial_context_length": context or config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": factor,
        "rope_ntk_alpha": scaling.beta_slow if scaling else 1.0,
        "rope_ntk_beta": scaling.beta_fast if scaling else 32.0,
    }


def gguf_metadata(config: GptOssConfig) -> dict[str, Any]:
    """Return the metadata of a GGUF file, by the `gguf` package's names; floats lose precision."""
    scaling = config.rope_scaling
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    if sliding != [layer % 2 == 0 for layer in range(config.num_layers)]:
        keys["attention.sliding_window_pattern"] = sliding
    if scaling is None:
        keys["rope.scaling.type"] = "none"
    else:
        keys["rope.scaling.type"] = "yarn"
        keys["rope.scaling.factor"] = scaling.factor
        keys["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        keys["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
        keys["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
    return {f"gpt-oss.{key}": value for key, value in keys.items()}


def _rope_scaling(scaling: YarnScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    values = {key: value for key, value in vars(scaling).items() if value is not None}
    return {"rope_type": "yarn", **values}

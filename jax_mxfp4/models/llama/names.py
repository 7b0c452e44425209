"""The names of a Llama's tensors in files, in one table."""

from typing import Literal

from jax_mxfp4.models.llama.config import LlamaConfig

Layout = Literal["gguf", "huggingface"]

# Our path, then the name in a GGUF file and in Hugging Face's layout.
_MODEL = {
    "embedding.embedding": ("token_embd", "model.embed_tokens"),
    "norm.scale": ("output_norm", "model.norm"),
}
_OUTPUT = {"output.kernel": ("output", "lm_head")}
_LAYER = {
    "attention_norm.scale": ("attn_norm", "input_layernorm"),
    "attention.q.kernel": ("attn_q", "self_attn.q_proj"),
    "attention.k.kernel": ("attn_k", "self_attn.k_proj"),
    "attention.v.kernel": ("attn_v", "self_attn.v_proj"),
    "attention.out.kernel": ("attn_output", "self_attn.o_proj"),
    "mlp_norm.scale": ("ffn_norm", "post_attention_layernorm"),
    "mlp.gate.kernel": ("ffn_gate", "mlp.gate_proj"),
    "mlp.up.kernel": ("ffn_up", "mlp.up_proj"),
    "mlp.down.kernel": ("ffn_down", "mlp.down_proj"),
}
_LAYER_PREFIX = ("blk", "model.layers")


def output_name(layout: Layout) -> str:
    """Return the name of the output layer's tensor, which a model with tied embeddings lacks."""
    return f"{_OUTPUT['output.kernel'][_column(layout)]}.weight"


def stored_names(config: LlamaConfig, layout: Layout) -> dict[str, str]:
    """Return path in a `Llama` -> name of the tensor, as "layers.0.mlp.up.kernel".

    Kernels are stored as weights [out, in], the transpose.
    """
    column = _column(layout)
    model = _MODEL if config.tie_embeddings else _MODEL | _OUTPUT
    names = {path: f"{both[column]}.weight" for path, both in model.items()}
    for index in range(config.num_layers):
        for path, both in _LAYER.items():
            prefix = f"{_LAYER_PREFIX[column]}.{index}"
            names[f"layers.{index}.{path}"] = f"{prefix}.{both[column]}.weight"
    return names


def _column(layout: Layout) -> int:
    return ("gguf", "huggingface").index(layout)

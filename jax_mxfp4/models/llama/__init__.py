"""Llama: load a GGUF file, compute logits, pack its layers.

model = Llama.from_gguf(path)
tokenizer = load_tokenizer(path)
logits = model(jnp.array([tokenizer.encode("Once upon a time").ids]))
packed, report = flax_layers.quantize_model(model, r"layers\\..*", scale_rule="mse")
"""

from jax_mxfp4.models.gpt_oss.tokenizer import load_tokenizer
from jax_mxfp4.models.llama.config import LlamaConfig
from jax_mxfp4.models.llama.modeling import Llama

__all__ = ["Llama", "LlamaConfig", "load_tokenizer"]

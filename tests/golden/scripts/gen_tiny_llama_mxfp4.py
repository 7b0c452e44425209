"""Makes tests/golden/tiny-llama-mxfp4: a random Llama, packed by compressed-tensors.

    python gen_tiny_llama_mxfp4.py DESTINATION

needs torch, transformers and compressed-tensors, and writes the folders

* bf16/: the model as transformers saves it;
* packed/: the same, its linear layers but lm_head packed by compressed-tensors;

and decoded.safetensors, the packed weights as compressed-tensors decodes them, with the logits
(float32) that transformers computes from them for a few tokens.
"""

import copy
import sys
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import MXFP4A16
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

GROUP = 32

destination = Path(sys.argv[1])
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    initializer_range=0.2,
    dtype="bfloat16",
)
model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
for name, parameter in model.named_parameters():
    if "norm" in name:
        parameter.data.normal_(1, 0.1)
    elif "_proj" in name:
        # Blocks of different sizes, so that scales differ; tails as of trained weights.
        spread = torch.randn(parameter.shape[0], parameter.shape[1] // GROUP).exp2()
        tails = torch.distributions.StudentT(4.0).sample(parameter.shape) * 0.1
        parameter.data.copy_(tails * spread.repeat_interleave(GROUP, 1))
model.save_pretrained(destination / "bf16")

scheme = QuantizationScheme(targets=["Linear"], **copy.deepcopy(MXFP4A16))
apply_quantization_config(
    model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
)
for module in model.modules():
    if getattr(module, "quantization_scheme", None) is not None:
        groups = module.weight.unflatten(1, (-1, GROUP))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
compressor = ModelCompressor.from_pretrained_model(model)
compressor.compress_model(model)
model.save_pretrained(destination / "packed")
compressor.update_config(destination / "packed")

compressor.decompress_model(model)
decoded = {
    f"{name}.weight": module.weight.data.contiguous()
    for name, module in model.named_modules()
    if getattr(module, "quantization_scheme", None) is not None
}
# Another model, because the rotary frequencies of the first have been rounded to bfloat16.
exact = LlamaForCausalLM.from_pretrained(destination / "bf16", dtype=torch.float32).eval()
exact.load_state_dict({**exact.state_dict(), **decoded})
tokens = torch.randint(0, config.vocab_size, (2, 16))
with torch.no_grad():
    logits = exact(tokens).logits
save_file(
    {**decoded, "tokens": tokens.int(), "logits": logits.contiguous()},
    destination / "decoded.safetensors",
    {"torch": torch.__version__, "transformers": transformers.__version__},
)

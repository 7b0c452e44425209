"""GPT-OSS: load a checkpoint, compute logits, generate.

model = GptOss.from_pretrained(builtin_path())
tokenizer = load_tokenizer(builtin_path())
prompt = tokenizer.encode("Once upon a time").ids
(new,) = generate(model, prompt, max_new_tokens=40)
print(tokenizer.decode(prompt + new))
"""

from jax_mxfp4.models.gpt_oss.builtin import builtin_path, mini_path
from jax_mxfp4.models.gpt_oss.cache import KVCache
from jax_mxfp4.models.gpt_oss.config import GptOssConfig, YarnScaling
from jax_mxfp4.models.gpt_oss.config_json import read_config
from jax_mxfp4.models.gpt_oss.generate import generate
from jax_mxfp4.models.gpt_oss.modeling import GptOss
from jax_mxfp4.models.gpt_oss.params import Params, abstract_params, load_params
from jax_mxfp4.models.gpt_oss.tokenizer import load_tokenizer

__all__ = [
    "GptOss",
    "GptOssConfig",
    "KVCache",
    "Params",
    "YarnScaling",
    "abstract_params",
    "builtin_path",
    "generate",
    "load_params",
    "load_tokenizer",
    "mini_path",
    "read_config",
]

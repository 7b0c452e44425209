"""Makes tests/golden/tiny_llama_gguf.npz: transformers' logits for the file of tests/tiny_llama.py.

    python gen_tiny_llama_gguf.py DESTINATION.npz

needs torch, transformers, accelerate and gguf. transformers reads the same GGUF file, so that its
decoding of block types and of the order of rows is part of the comparison.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
import tiny_llama

logits = {}
for tied in (True, False):
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama.write_gguf(Path(folder) / "tiny.gguf", tied=tied)
        model = LlamaForCausalLM.from_pretrained(
            folder, gguf_file="tiny.gguf", dtype=torch.float32, attn_implementation="eager"
        )
    with torch.inference_mode():
        tokens = torch.from_numpy(tiny_llama.TOKENS.astype(np.int64))
        logits["tied" if tied else "untied"] = model.eval()(tokens).logits.numpy()
np.savez_compressed(sys.argv[1], **logits)

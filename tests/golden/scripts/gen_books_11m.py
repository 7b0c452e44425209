"""Makes tests/golden/books_11m.npz: what transformers computes with the built-in model books-11m.

    python gen_books_11m.py DESTINATION.npz

needs torch, transformers and accelerate. The token ids are those of mini-gptoss/ppl_golden.npz,
whose vocabulary is the same.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import GptOssForCausalLM, Mxfp4Config

TESTS = Path(__file__).parents[2]
MODEL = TESTS.parent / "jax_mxfp4" / "models" / "gpt_oss" / "books-11m"
TEXTS = ("books_val", "wiki", "wikitext2_test_detok")
POSITIONS = 8  # of the first window whose logits are kept
BATCH = 8

model = GptOssForCausalLM.from_pretrained(
    MODEL,
    dtype=torch.float32,
    attn_implementation="eager",
    quantization_config=Mxfp4Config(dequantize=True),
).eval()
tokens = np.load(TESTS / "golden" / "mini-gptoss" / "ppl_golden.npz")
golden = {}
for text in TEXTS:
    losses = []
    for batch in torch.from_numpy(tokens[f"{text}.tokens"].astype(np.int64)).split(BATCH):
        with torch.inference_mode():
            logits = model(batch).logits
        if not losses:
            golden[f"{text}.logits"] = logits[0, :POSITIONS].numpy()
        chances = torch.log_softmax(logits[:, :-1].double(), -1)
        losses.append(-chances.gather(-1, batch[:, 1:, None]).mean().item())
    golden[f"{text}.nll"] = np.float64(np.mean(losses))
    print(text, np.exp(golden[f"{text}.nll"]))
np.savez_compressed(sys.argv[1], **golden)

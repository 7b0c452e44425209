"""Load what `jax-mxfp4 convert` writes with transformers, OpenAI's gpt-oss and llama.cpp.

Their environment is not that of the tests, so that this is a program with a recorded result
(`results/`). With Python 3.11 or newer, on a CPU:

    pip install . torch transformers accelerate cyllama
    pip install --no-deps --ignore-requires-python gpt-oss
    python tests/interop/run.py --output tests/interop/results/DATE.json

The golden checkpoint (tests/golden/tiny-gptoss) and the built-in model mini are converted, and
their logits compared with those of the other implementation for a file that this package did not
write, and with the golden ones. The exit status is 1 if one is further away than its bound.

Bounds: the same program must give the same logits for the same weights, so 0 where only the
conversion differs. Against golden float32 logits 1e-4, as in the other tests. llama.cpp multiplies
MXFP4 by activations that it rounds to 8 bits, and rounds the ends of the YaRN ramp: cosine 0.99.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpt_oss.torch.model import Transformer
from llama_cpp import LlamaCpp, ggml_version
from transformers import AutoTokenizer, GptOssForCausalLM, Mxfp4Config

from jax_mxfp4.checkpoints import GgufFile
from jax_mxfp4.checkpoints.gguf_vocabulary import tokenizer_from_metadata
from jax_mxfp4.convert import convert
from jax_mxfp4.models.gpt_oss import GptOss, load_tokenizer, mini_path

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-gptoss"
HF, OPENAI, GGUF = GOLDEN / "hf", GOLDEN / "original", GOLDEN / "tiny-mxfp4.gguf"
TEXT = (
    "Once upon a time, there was\n\n  naïve 日本 text: it's 2026!<|endoftext|>HelloWORLD, "
    "I'LL x=3.14159/2\n"
    "\tdef f(x):\r\n        return {'a': [x] * 10}  # Ünïcödé … ½ 👍🏽\n\n\nThe END."
)


def main() -> int:
    """Run every comparison, print and record the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = _compare(Path(scratch))
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "device": "CPU",
        "versions": {
            **{
                name: version(name)
                for name in ("jax", "torch", "transformers", "gpt-oss", "cyllama", "tokenizers")
            },
            "ggml": ggml_version(),
        },
        "comparisons": rows,
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
    return 0 if all(row["passed"] for row in rows) else 1


class _Comparisons:
    """The rows of the report."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def _add(self, package: str, what: str, passed: bool, **measured: float) -> None:
        self.rows.append({"package": package, "comparison": what, **measured, "passed": passed})

    def near(
        self, package: str, what: str, found: np.ndarray, wanted: np.ndarray, bound: float
    ) -> None:
        error = float(np.max(np.abs(found - wanted)))
        self._add(package, what, error <= bound, largest_error=error, bound=bound)

    def similar(
        self, package: str, what: str, found: np.ndarray, wanted: np.ndarray, bound: float
    ) -> None:
        cosine = float(np.vdot(found, wanted) / np.linalg.norm(found) / np.linalg.norm(wanted))
        same = float(np.mean(found.argmax(-1) == wanted.argmax(-1)))
        self._add(package, what, cosine >= bound, cosine=cosine, bound=bound, same_argmax=same)

    def same_tokens(self, package: str, what: str, found: list[int], wanted: list[int]) -> None:
        self._add(package, f"tokens of a text: {what}", found == wanted, tokens=len(wanted))


def _compare(scratch: Path) -> list[dict[str, Any]]:
    mini = mini_path()
    conversions = {
        "hf.gguf": (HF, None),
        "hf-gguf-hf": (scratch / "hf.gguf", None),
        "hf-openai": (HF, "openai"),
        "hf-openai-hf": (scratch / "hf-openai", None),
        "gguf-openai": (scratch / "hf.gguf", "openai"),
        "gguf.gguf": (GGUF, None),
        "gguf-hf": (GGUF, None),
        "mini.gguf": (mini, None),
        "mini-openai": (mini, "openai"),
        "mini-gguf-hf": (scratch / "mini.gguf", None),
    }
    for name, (source, layout) in conversions.items():
        convert(source, scratch / name, layout)
    oracle = np.load(GOLDEN / "hf_oracle.npz")
    tokens, golden = oracle["tokens"], oracle["fp32.logits"]
    mini_tokens = np.load(GOLDEN.parent / "mini-gptoss" / "ppl_golden.npz")["wiki.tokens"][:2, :64]
    mini_logits = np.asarray(GptOss.from_pretrained(mini, np.float32)(mini_tokens))
    report = _Comparisons()

    expected = _transformers(HF, tokens)
    report.near("transformers", "tiny: golden file, golden logits", expected, golden, 1e-4)
    for name in ("hf-gguf-hf", "hf-openai-hf"):
        found = _transformers(scratch / name, tokens)
        report.near("transformers", f"tiny: {name}, golden file", found, expected, 0)
    # Its norms and biases are float32 now, but hold the same values.
    found = _transformers(scratch / "gguf-hf", tokens)
    report.near("transformers", "tiny: gguf-hf, golden file", found, expected, 0)
    expected = _transformers(mini, mini_tokens)
    report.near("transformers", "mini: original file, this package", expected, mini_logits, 1e-4)
    found = _transformers(scratch / "mini-gguf-hf", mini_tokens)
    report.near("transformers", "mini: mini-gguf-hf, original file", found, expected, 0)

    expected = _openai(OPENAI, tokens)
    report.near("gpt-oss", "tiny: golden file, golden logits", expected, golden, 1e-4)
    for name in ("hf-openai", "gguf-openai"):
        found = _openai(scratch / name, tokens)
        report.near("gpt-oss", f"tiny: {name}, golden file", found, expected, 0)
    found = _openai(scratch / "mini-openai", mini_tokens)
    report.near("gpt-oss", "mini: mini-openai, this package", found, mini_logits, 1e-4)

    expected = LlamaCpp(GGUF).logits(tokens)
    found = LlamaCpp(scratch / "gguf.gguf").logits(tokens)
    report.near("llama.cpp", "tiny: gguf.gguf, golden file", found, expected, 0)
    found = LlamaCpp(scratch / "hf.gguf").logits(tokens)
    report.similar("llama.cpp", "tiny: hf.gguf, golden logits", found, golden, 0.99)
    model = LlamaCpp(scratch / "mini.gguf")
    found = model.logits(mini_tokens)
    report.similar("llama.cpp", "mini: mini.gguf, this package", found, mini_logits, 0.99)

    wanted = load_tokenizer(mini).encode(TEXT).ids
    report.same_tokens("llama.cpp", "mini.gguf, tokenizers", model.tokenize(TEXT), wanted)
    found = AutoTokenizer.from_pretrained(scratch / "mini-gguf-hf").encode(TEXT)
    report.same_tokens("transformers", "mini-gguf-hf, tokenizers", found, wanted)
    released = _with_rule_of_gpt_oss(scratch)
    convert(released, scratch / "released.gguf")
    found = LlamaCpp(scratch / "released.gguf").tokenize(TEXT)
    wanted = load_tokenizer(released).encode(TEXT).ids
    report.same_tokens("llama.cpp", "GPT-OSS's way to split text, tokenizers", found, wanted)
    return report.rows


def _with_rule_of_gpt_oss(scratch: Path) -> Path:
    """Return a copy of the model mini whose tokenizer splits text as that of GPT-OSS does."""
    folder = shutil.copytree(mini_path(), scratch / "released")
    metadata = GgufFile(scratch / "mini.gguf").metadata
    changed = dict(metadata) | {"tokenizer.ggml.pre": "gpt-4o"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_from_metadata(folder, changed)))
    return folder


def _transformers(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model = GptOssForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def _openai(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model = Transformer.from_checkpoint(str(folder), device="cpu").float()
    with torch.inference_mode():
        return np.stack([model(torch.from_numpy(row)).float().numpy() for row in tokens])


if __name__ == "__main__":
    sys.exit(main())

"""A tiny random Llama as a GGUF file, the same on every machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 300, 64, 64, 2, 2, 1, 32
TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, (2, 24), np.int32)


def _bytes_of_gpt2() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table.get(byte, chr(byte)) for byte in range(256)]


def tensors(tied: bool = True) -> dict[str, np.ndarray]:
    """Float32 tensors by GGUF name, queries and keys in llama.cpp's order of rows."""
    draw = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        # Heavy tails and columns of different sizes, as in trained models.
        tails = draw.standard_t(4, (rows, columns)) / np.sqrt(2 * columns)
        return (tails * 2 ** draw.normal(0, 0.5, columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return draw.normal(1, 0.2, WIDTH).astype(np.float32)

    # A few directions dominate the hidden states, as in trained models.
    directions = draw.normal(size=(VOCABULARY, 12)) @ draw.normal(size=(12, WIDTH)) / 4
    noise = draw.normal(0, 0.2, (VOCABULARY, WIDTH))
    found = {"token_embd.weight": (directions + noise).astype(np.float32)}
    for layer in range(LAYERS):
        shapes = {
            "attn_q": (HEADS * HEAD_DIM, WIDTH),
            "attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
            "attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
            "attn_output": (WIDTH, HEADS * HEAD_DIM),
            "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
        }
        for name, shape in shapes.items():
            found[f"blk.{layer}.{name}.weight"] = matrix(*shape)
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{name}.weight"] = norm()
    found["output_norm.weight"] = norm()
    if not tied:
        found["output.weight"] = matrix(VOCABULARY, WIDTH)
    return found


def write_gguf(
    path: Path,
    *,
    tied: bool = True,
    replace: Mapping[str, np.ndarray | None] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model; the values of `replace` and `metadata` take the place of others."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCABULARY)
    values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", **(metadata or {})}
    for key, value in values.items():
        writer.add_string(key, value)
    vocabulary = ["<|endoftext|>", *_bytes_of_gpt2(), "th", "Ġth", "the"]
    vocabulary += [f"<unused{i}>" for i in range(VOCABULARY - len(vocabulary))]
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, *[1] * (VOCABULARY - 1)])
    writer.add_token_merges(["t h", "Ġ th", "th e"])
    for name, array in {**tensors(tied), **(replace or {})}.items():
        if array is None:
            continue
        kind = _kind(name)
        writer.add_tensor(name, quantize(array, kind) if kind else array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _kind(name: str) -> GGMLQuantizationType | None:
    """The element types that the file of SmolLM2 mixes; None is float32."""
    if name == "token_embd.weight":
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.Q4_1 if ".ffn_up." in name or ".attn_q." in name else None

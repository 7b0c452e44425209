"""The tokenizer that is made of the vocabulary of a GGUF file."""

from pathlib import Path

import pytest
import tiny_llama

from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.models.llama import load_tokenizer


def test_merges_and_digits(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama.write_gguf(tmp_path / "tiny.gguf"))
    encoding = tokenizer.encode("the then 42")
    assert encoding.tokens == ["the", "Ġth", "e", "n", "Ġ", "4", "2"]


@pytest.mark.parametrize("text", ["a b\n c", "naïve 日本", "", "  ", "x<|endoftext|>y"])
def test_round_trip(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_llama.write_gguf(tmp_path / "tiny.gguf"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (0 in ids) == ("<|endoftext|>" in text)


@pytest.mark.parametrize(
    ("key", "value"), [("tokenizer.ggml.model", "llama"), ("tokenizer.ggml.pre", "llama-bpe")]
)
def test_other_tokenizers_are_refused(tmp_path: Path, key: str, value: str) -> None:
    file = tiny_llama.write_gguf(tmp_path / "tiny.gguf", metadata={key: value})
    with pytest.raises(CheckpointError, match=f"'{key}' '.*, found .*'{value}'"):
        load_tokenizer(file)

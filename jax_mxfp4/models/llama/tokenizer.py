"""The tokenizer whose vocabulary a GGUF file holds."""

from pathlib import Path
from typing import TYPE_CHECKING

from jax_mxfp4.checkpoints import CheckpointError, GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Values of `tokenizer.ggml.token_type`: llama.cpp's LLAMA_TOKEN_TYPE_*.
_CONTROL, _USER_DEFINED = 3, 4
# `tokenizer.ggml.pre` -> whether every digit is a token of its own. Both then split as GPT-2 does.
_SINGLE_DIGITS = {"gpt-2": False, "smollm": True}


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Returns the byte-level BPE tokenizer of the GGUF file `path`.

    It adds no token of its own at the beginning or the end of a text.

    Raises:
      CheckpointError: the file has no such tokenizer, or another kind of one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path = Path(path)
    metadata = GgufFile(path).metadata
    tokens, merges = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    kind, pre = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    problems = []
    if kind != "gpt2":
        problems.append(f"'tokenizer.ggml.model': expected 'gpt2', found {kind!r}")
    if pre not in _SINGLE_DIGITS:
        known = " or ".join(map(repr, _SINGLE_DIGITS))
        problems.append(f"'tokenizer.ggml.pre': expected {known}, found {pre!r}")
    for name, value in (("tokens", tokens), ("merges", merges)):
        if not isinstance(value, list):
            problems.append(f"'tokenizer.ggml.{name}': expected a list of strings, found none")
    if problems:
        raise CheckpointError(path, problems)
    assert isinstance(tokens, list) and isinstance(merges, list) and isinstance(pre, str)

    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if _SINGLE_DIGITS[pre]
        else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", ())
    for token, number in zip(tokens, types, strict=False):
        if number in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=number == _CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    return tokenizer

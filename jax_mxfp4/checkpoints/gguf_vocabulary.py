"""The vocabulary of a byte-level BPE tokenizer: `tokenizer.json`, and the keys llama.cpp reads.

llama.cpp needs `tokenizer.ggml.*`: tokens, their types, merges, and the name of the rule that
splits text before merging. Hugging Face's tokenizer.json says the same, and more that GPT-OSS does
not use. Sources: ggml-org/ggml `docs/gguf.md`; llama.cpp `conversion/base.py` (what its converter
writes for GPT-OSS) and `src/llama-vocab.cpp` (the rules).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType

from jax_mxfp4.checkpoints.errors import CheckpointError, shorten

_START = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# tiktoken's o200k_base, which GPT-OSS has.
_O200K = "|".join(
    (
        f"{_START}{_UPPER}*{_LOWER}+{_ENDINGS}",
        f"{_START}{_UPPER}+{_LOWER}*{_ENDINGS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# llama.cpp's name of a rule -> the steps of a pre-tokenizer.
_RULES: dict[str, tuple[dict[str, Any], ...]] = {
    "gpt-4o": (
        {"type": "Split", "pattern": {"Regex": _O200K}, "behavior": "Isolated", "invert": False},
        _BYTE_LEVEL | {"use_regex": False},
    ),
    "gpt-2": (_BYTE_LEVEL | {"use_regex": True},),
    "smollm": (
        {"type": "Digits", "individual_digits": True},
        _BYTE_LEVEL | {"use_regex": True},
    ),
}
_MODEL = "gpt2"  # llama.cpp's name of byte-level BPE
_PREFIX = "tokenizer.ggml."
# Settings of a BPE model that would change its tokens, and that llama.cpp does not have.
_UNSUPPORTED = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
# Names of special tokens in tokenizer_config.json, and of their ids here.
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
}


class UnsupportedVocabularyError(ValueError):
    """llama.cpp has no tokenizer that does what a tokenizer.json says."""


def vocabulary_metadata(
    tokenizer: Mapping[str, Any], tokenizer_config: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
    """Return the keys `tokenizer.ggml.*` for a tokenizer.json.

    Args:
      tokenizer: content of tokenizer.json, that the `tokenizers` package accepts.
      tokenizer_config: content of tokenizer_config.json, which names the special tokens.
      vocab_size: rows of the embedding; ids without a token become unused ones.

    Raises:
      UnsupportedVocabularyError: it is no byte-level BPE with a known rule, or has tokens outside
        the embedding.
    """
    model, added = _checked(tokenizer)
    for setting in _UNSUPPORTED:
        if model.get(setting):
            raise UnsupportedVocabularyError(f"{setting} {shorten(model[setting])}")
    if tokenizer.get("normalizer"):
        raise UnsupportedVocabularyError(f"normalizer {shorten(tokenizer['normalizer'])}")
    rule = _rule_of(tokenizer.get("pre_tokenizer"))
    ids = model["vocab"] | {content: token["id"] for content, token in added.items()}
    outside = [token for token, i in ids.items() if not 0 <= i < vocab_size]
    if outside:
        raise UnsupportedVocabularyError(
            f"{len(outside)} tokens outside the embedding of {vocab_size} rows: {shorten(outside)}"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in ids.items():
        kind = TokenType.NORMAL
        if token in added:
            kind = TokenType.CONTROL if added[token].get("special") else TokenType.USER_DEFINED
        tokens[i], types[i] = token, int(kind)
    metadata = {
        f"{_PREFIX}model": _MODEL,
        f"{_PREFIX}pre": rule,
        f"{_PREFIX}tokens": tokens,
        f"{_PREFIX}token_type": types,
        f"{_PREFIX}merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
        ],
    }
    for kind, key in _SPECIAL.items():
        named = tokenizer_config.get(kind)
        content = named.get("content") if isinstance(named, Mapping) else named
        if isinstance(content, str) and content in ids:
            metadata[f"{_PREFIX}{key}"] = ids[content]
    return metadata


def tokenizer_from_metadata(file: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json for the vocabulary in a GGUF file.

    Args:
      file: for messages.
      metadata: see `jax_mxfp4.checkpoints.GgufFile`.

    Raises:
      CheckpointError: there is no vocabulary, or none that this function understands.
    """
    model, rule = (metadata.get(f"{_PREFIX}{key}") for key in ("model", "pre"))
    if model != _MODEL or rule not in tuple(_RULES):
        raise CheckpointError(
            file,
            f"has no tokenizer.json; one can be made of the vocabulary for {_PREFIX + 'model'!r} "
            f"{_MODEL!r} and {_PREFIX + 'pre'!r} {' or '.join(map(repr, _RULES))}, found "
            f"{shorten(model)} and {shorten(rule)}",
        )
    tokens, merges = (_strings(file, metadata, key) for key in ("tokens", "merges"))
    types = metadata.get(f"{_PREFIX}token_type")
    if not isinstance(types, np.ndarray) or types.shape != (len(tokens),):
        raise CheckpointError(
            file, f"{_PREFIX + 'token_type'!r}: expected a number for each of {len(tokens)} tokens"
        )
    pairs = [merge.split(" ") for merge in merges]
    if wrong := [merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise CheckpointError(
            file, f"{_PREFIX + 'merges'!r}: expected two tokens each, found {shorten(wrong[0])}"
        )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocabulary: dict[str, int] = {}
    added = []
    for i, (token, kind) in enumerate(zip(tokens, types.tolist(), strict=True)):
        if kind == TokenType.UNUSED:
            continue
        # Added tokens are in the vocabulary too: the `tokenizers` package numbers those that are
        # not by itself, whatever their "id" says.
        vocabulary[token] = i
        if kind != TokenType.NORMAL:
            is_control = bool(kind == TokenType.CONTROL)
            added.append({"id": i, "content": token, **flags, "special": is_control})
    if len(vocabulary) != np.count_nonzero(types != TokenType.UNUSED):
        raise CheckpointError(file, f"{_PREFIX + 'tokens'!r}: two tokens are the same")
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(_RULES[rule])},
        "post_processor": None,
        "decoder": _BYTE_LEVEL | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs},
    }


def has_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF file says that it has a vocabulary."""
    return metadata.get(f"{_PREFIX}model", "none") != "none"


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return what tokenizer_config.json says of a vocabulary: `eos_token` and the like."""
    tokens = metadata[f"{_PREFIX}tokens"]
    ids = {kind: metadata.get(f"{_PREFIX}{key}") for kind, key in _SPECIAL.items()}
    return {kind: tokens[i] for kind, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}


def _checked(tokenizer: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the BPE model and the added tokens by content, after a look at their structure."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if (
        not isinstance(model, dict)
        or model.get("type") != "BPE"
        or model.get("byte_fallback")
        or not isinstance(vocabulary, dict)
        or not all(type(i) is int for i in vocabulary.values())
        or not isinstance(merges, list)
        or not all(isinstance(merge, str) or _is_pair(merge) for merge in merges)
    ):
        raise UnsupportedVocabularyError(f"expected byte-level BPE, found model {shorten(model)}")
    if not isinstance(added, list) or not all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
        for token in added
    ):
        raise UnsupportedVocabularyError(f"expected added tokens, found {shorten(added)}")
    return model, {token["content"]: token for token in added}


def _is_pair(merge: Any) -> bool:
    return (
        isinstance(merge, list)
        and len(merge) == 2
        and all(isinstance(token, str) and " " not in token for token in merge)
    )


def _rule_of(pre_tokenizer: Any) -> str:
    """Return llama.cpp's name for what `pre_tokenizer` does."""
    steps = pre_tokenizer
    if isinstance(pre_tokenizer, Mapping):
        is_sequence = pre_tokenizer.get("type") == "Sequence"
        steps = pre_tokenizer.get("pretokenizers") if is_sequence else [pre_tokenizer]
    if isinstance(steps, list) and all(isinstance(step, Mapping) for step in steps):
        found = [
            # Offsets into the text do not change tokens; the expression is used by default.
            {"use_regex": True, **step, "trim_offsets": True} if _is_byte_level(step) else step
            for step in steps
        ]
        for name, wanted in _RULES.items():
            if found == list(wanted):
                return name
    raise UnsupportedVocabularyError(f"pre_tokenizer {shorten(pre_tokenizer)}")


def _is_byte_level(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "ByteLevel"


def _strings(file: Path, metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(f"{_PREFIX}{key}")
    if not isinstance(value, list):
        raise CheckpointError(
            file, f"{_PREFIX + key!r}: expected a list of strings, found {shorten(value)}"
        )
    for text in value:
        # Bytes that are not UTF-8 were kept as lone surrogates, which no JSON file can hold.
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise CheckpointError(file, f"{_PREFIX + key!r}: expected UTF-8, found {shorten(text)}")
    return value

"""The tokenizer of a checkpoint, as files beside the weights and as metadata of a GGUF file."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mxfp4.checkpoints import CheckpointError, GgufFile, parse_json_object
from jax_mxfp4.checkpoints.gguf_vocabulary import (
    UnsupportedVocabularyError,
    has_vocabulary,
    special_tokens,
    tokenizer_from_metadata,
    vocabulary_metadata,
)
from jax_mxfp4.models.gpt_oss.config import GptOssConfig

_EOS = "tokenizer.ggml.eos_token_id"
# llama.cpp loads a file without a vocabulary only if it is told that there is none.
_NO_VOCABULARY = {"tokenizer.ggml.model": "none"}


def ggml_vocabulary(config: GptOssConfig, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the metadata that lets llama.cpp read and write text.

    Without a tokenizer.json it says that there is none; so it does, with a warning that says why,
    for a tokenizer that llama.cpp does not have.

    Args:
      config: of the model.
      files: content of the files beside the weights, by name.

    Raises:
      CheckpointError: tokenizer.json or tokenizer_config.json is not JSON.
    """
    if "tokenizer.json" not in files:
        return _NO_VOCABULARY
    tokenizer, tokenizer_config = (
        parse_json_object(Path(name), files.get(name, b"{}"))
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
    try:
        metadata = vocabulary_metadata(tokenizer, tokenizer_config, config.vocab_size)
    except UnsupportedVocabularyError as error:
        warnings.warn(
            f"the GGUF file gets no vocabulary for llama.cpp, which has no such tokenizer: {error}",
            stacklevel=2,
        )
        return _NO_VOCABULARY
    if config.eos_token_ids:
        metadata.setdefault(_EOS, config.eos_token_ids[0])
    return metadata


def tokenizer_files(reader: GgufFile) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json made of the vocabulary that llama.cpp reads.

    Without a vocabulary there are none; so it is, with a warning that says why, for one that is
    not understood.
    """
    if not has_vocabulary(reader.metadata):
        return {}
    try:
        tokenizer = tokenizer_from_metadata(reader.path, reader.metadata)
    except CheckpointError as error:
        warnings.warn(f"no tokenizer.json is written: {error}", stacklevel=2)
        return {}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens(reader.metadata),
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": (json.dumps(tokenizer_config, indent=2) + "\n").encode(),
    }

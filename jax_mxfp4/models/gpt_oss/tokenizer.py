"""The tokenizer that lies beside a checkpoint, or in it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_mxfp4.checkpoints import (
    CheckpointError,
    GgufFile,
    is_gguf,
    parse_json_object,
    read_json_object,
)
from jax_mxfp4.checkpoints.gguf_vocabulary import tokenizer_from_metadata

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CARRIED_TOKENIZER = "tokenizer.huggingface.json"
"""The GGUF specification's key for a whole tokenizer.json."""

MAX_TOKENIZER_BYTES = 2**26
"""Size of the largest file of a tokenizer that is read; GPT-OSS has 28 MB."""


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Return the `tokenizers.Tokenizer` of the checkpoint `path`.

    Args:
      path: a folder with tokenizer.json, or a GGUF file that carries that text, or else the
        vocabulary for llama.cpp.

    Raises:
      CheckpointError: `path` has no tokenizer.json and no vocabulary that can take its place, or
        what it has is no tokenizer.
    """
    path = Path(path)
    if is_gguf(path):
        metadata = GgufFile(path, strict=False).metadata
        text = metadata.get(CARRIED_TOKENIZER)
        if text is None:
            return _build(path, tokenizer_from_metadata(path, metadata))
        return _build(path, parse_json_object(path, text, f"metadata key {CARRIED_TOKENIZER!r}"))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            file, "missing; text needs the checkpoint's tokenizer beside its weights"
        )
    return _build(file, read_json_object(file, MAX_TOKENIZER_BYTES))


def _build(file: Path, tokenizer: dict[str, Any]) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(tokenizer))
    except BaseException as error:
        # The library has no exceptions of its own: it raises bare ones for text that it does not
        # understand, and a panic of its compiled code derives from BaseException only.
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise CheckpointError(file, f"is no tokenizer: {error}") from error
        raise

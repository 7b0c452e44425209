"""The tokenizer that lies beside a checkpoint, or in it."""

from pathlib import Path
from typing import TYPE_CHECKING

from jax_mxfp4.checkpoints import (
    CheckpointError,
    GgufFile,
    is_gguf,
    parse_json_object,
    read_json_object,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CARRIED_TOKENIZER = "tokenizer.huggingface.json"
"""The GGUF specification's key for a whole tokenizer.json."""


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Return the `tokenizers.Tokenizer` of the checkpoint `path`.

    Args:
      path: a folder with tokenizer.json, or a GGUF file that carries that text.

    Raises:
      CheckpointError: `path` has no tokenizer.json, or that is no tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    if is_gguf(path):
        text = GgufFile(path).metadata.get(CARRIED_TOKENIZER)
        if text is None:
            raise CheckpointError(
                path, f"has no metadata {CARRIED_TOKENIZER!r}; text needs a tokenizer.json"
            )
        _require_model(path, parse_json_object(path, text, f"metadata key {CARRIED_TOKENIZER!r}"))
        return Tokenizer.from_str(text)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            file, "missing; text needs the checkpoint's tokenizer beside its weights"
        )
    _require_model(file, read_json_object(file))
    return Tokenizer.from_file(str(file))


def _require_model(file: Path, tokenizer: dict) -> None:
    # The library reports a damaged file as a bare Exception that does not name it.
    if "model" not in tokenizer:
        raise CheckpointError(file, "expected a tokenizer with a 'model', found none")

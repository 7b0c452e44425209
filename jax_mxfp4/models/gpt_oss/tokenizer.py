"""The tokenizer that lies beside a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from jax_mxfp4.checkpoints import CheckpointError, read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(folder: str | Path) -> "Tokenizer":
    """Return the `tokenizers.Tokenizer` of the checkpoint in `folder`.

    Raises:
      CheckpointError: `folder` has no tokenizer.json, or that file is no tokenizer.
    """
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            file, "missing; text needs the checkpoint's tokenizer beside its weights"
        )
    # The library reports a damaged file as a bare Exception that does not name it.
    if "model" not in read_json_object(file):
        raise CheckpointError(file, "expected a tokenizer with a 'model', found none")
    return Tokenizer.from_file(str(file))

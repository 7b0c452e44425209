"""The text that a model is judged on, and a name for it that others can check.

The built-in excerpt, `kidnapped.txt`, is the beginning of Robert Louis Stevenson's "Kidnapped"
(1886, in the public domain) from github.com/mlschmitt/classic-books-markdown@94488272, without
markup and with line ends of one character. The built-in models were not trained on it.
"""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

# What is often evaluated under the same name in different forms; by SHA-256 of the file.
_KNOWN = {
    "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08": (
        "WikiText-2 raw, test split, as published"
    ),
}


@dataclass(frozen=True)
class Text:
    """A text and where it is from.

    Attributes:
      content: the characters, as decoded from UTF-8; nothing is stripped or normalized.
      form: which text in which form, for people.
      sha256: of the file's bytes.
      nbytes: of the file.
    """

    content: str
    form: str
    sha256: str
    nbytes: int


def read_text(path: str | Path | None = None) -> Text:
    """Read a text, by default the excerpt that is part of this package.

    Args:
      path: a file in UTF-8.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is empty or not UTF-8.
    """
    if path is None:
        data = (resources.files("jax_mxfp4.validation") / "kidnapped.txt").read_bytes()
        form = "R. L. Stevenson, Kidnapped, first chapters (built in)"
    else:
        data = Path(path).read_bytes()
        form = f"{Path(path).name}, as it is in the file"
    digest = hashlib.sha256(data).hexdigest()
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text in UTF-8, found {error}") from error
    if not content:
        raise ValueError(f"{path}: expected a text, found an empty file")
    return Text(content, _KNOWN.get(digest, form), digest, len(data))

"""Text from tokens that arrive one at a time."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoding puts in place of bytes that are no valid UTF-8


class TextStream:
    """Decodes a growing sequence of tokens without ever splitting a character.

    GPT-OSS tokenizers are byte-level: a token is a string of bytes, and a character may need
    several tokens. The pieces that `push` and `finish` return add up to the decoded sequence.
    Special tokens have no text.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        """Start with no tokens."""
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Add a token; return the text that is complete now, "" inside a character."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(_REPLACEMENT):
            return ""
        self._pending.clear()
        return text

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that was never completed."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text

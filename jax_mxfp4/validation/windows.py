"""Cutting a text into the windows in which a model sees it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Protocol:
    """How perplexity is measured; two figures compare only if all of this is equal.

    The text is tokenized as a whole, without special tokens. Windows of `window` tokens start
    every `stride` tokens; in each, the tokens are scored that no earlier window has scored. A
    token can be scored only if another precedes it in its window: with stride == window the first
    token of every window goes unscored, with a smaller stride only the first of the text. A `bos`
    takes the first place of every window.

    Attributes:
      window: tokens in a window, `bos` included; at least 2.
      stride: tokens from the start of a window to the next; 1 to the text tokens in a window.
      bos: id that begins every window, or None.
      max_tokens: only so many tokens of the text are used; None for all.

    Raises:
      ValueError: a number is outside its range.
    """

    window: int = 256
    stride: int = 256
    bos: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.window < 2:
            raise ValueError(f"window: expected at least 2 tokens, found {self.window}")
        if not 1 <= self.stride <= self.room:
            raise ValueError(f"stride: expected 1 to {self.room}, found {self.stride}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens: expected at least 2, found {self.max_tokens}")

    @property
    def room(self) -> int:
        """Tokens of the text in a window."""
        return self.window - (self.bos is not None)


@dataclass(frozen=True)
class Windows:
    """A text cut into windows.

    Attributes:
      tokens: int32 [N, W]; the last window is padded at its end with its last token.
      scored: bool [N, W], which tokens count; the first of a window never does.
    """

    tokens: np.ndarray
    scored: np.ndarray

    @property
    def num_scored(self) -> int:
        """How many tokens count."""
        return int(self.scored.sum())

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (tokens, scored) of `size` windows at a time, the last filled up unscored."""
        for first in range(0, len(self.tokens), size):
            tokens, scored = self.tokens[first : first + size], self.scored[first : first + size]
            missing = ((0, size - len(tokens)), (0, 0))
            yield np.pad(tokens, missing, mode="edge"), np.pad(scored, missing)


def split(tokens: Sequence[int] | np.ndarray, protocol: Protocol) -> Windows:
    """Cut the tokens of a text into windows by `protocol`.

    Args:
      tokens: ids [n] of the whole text.
      protocol: see there.

    Raises:
      ValueError: there are fewer than two tokens, or nothing can be scored.
    """
    text = np.asarray(tokens, np.int32)[: protocol.max_tokens]
    if text.ndim != 1 or len(text) < 2:
        raise ValueError(f"tokens: expected at least 2 in a row, found shape {text.shape}")
    start = protocol.window - protocol.room
    rows, marks = [], []
    done = 0
    for begin in range(0, len(text), protocol.stride):
        end = min(begin + protocol.room, len(text))
        row = np.full(protocol.window, text[end - 1], np.int32)
        row[:start] = protocol.bos or 0
        row[start : start + end - begin] = text[begin:end]
        mark = np.zeros(protocol.window, bool)
        mark[start + max(done - begin, 0) : start + end - begin] = True
        mark[0] = False
        rows.append(row)
        marks.append(mark)
        done = end
        if end == len(text):
            break
    return Windows(np.stack(rows), np.stack(marks))

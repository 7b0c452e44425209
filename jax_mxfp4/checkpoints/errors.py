"""The one exception of this package."""

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What a message shows of hostile input, which can have megabytes of names and values.
_MOST_PROBLEMS = 1000
_LONGEST_PROBLEM = 2000
_LONGEST_VALUE = 200

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = _SHORT.maxdict = _SHORT.maxlist = 4


def shorten(value: Any) -> str:
    """Return `repr(value)`, with dots in the place of what is long or nested deeply."""
    return _cut(_SHORT.repr(value), _LONGEST_VALUE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _printable(text: str) -> str:
    """Escape what a terminal would obey, or could not show: names of files can hold anything."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


class CheckpointError(ValueError):
    """A checkpoint cannot be used; says where and lists every problem that was found.

    Attributes:
      where: the file or folder that the problems were found in.
      problems: one sentence for each problem, in a stable order; the message has the first
        thousand.
    """

    def __init__(self, where: str | Path, problems: str | Sequence[str]) -> None:
        """Build the message from `where` and one or more `problems`."""
        self.where = str(where)
        given = (problems,) if isinstance(problems, str) else problems
        self.problems = tuple(_cut(_printable(problem), _LONGEST_PROBLEM) for problem in given)
        if len(self.problems) == 1:
            message = f"{_printable(self.where)}: {self.problems[0]}"
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems[:_MOST_PROBLEMS])
            if len(self.problems) > _MOST_PROBLEMS:
                lines += f"\n  - and {len(self.problems) - _MOST_PROBLEMS} more"
            message = f"{_printable(self.where)}: {len(self.problems)} problems{lines}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type["CheckpointError"], tuple[str, tuple[str, ...]]]:
        """Pickle by the constructor's arguments, which are not the message."""
        return type(self), (self.where, self.problems)

"""The one exception of this package."""

from collections.abc import Sequence
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be used; says where and lists every problem that was found.

    Attributes:
      where: the file or folder that the problems were found in.
      problems: one sentence for each problem, in a stable order.
    """

    def __init__(self, where: str | Path, problems: str | Sequence[str]) -> None:
        """Build the message from `where` and one or more `problems`."""
        self.where = str(where)
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            message = f"{self.where}: {self.problems[0]}"
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            message = f"{self.where}: {len(self.problems)} problems{lines}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type["CheckpointError"], tuple[str, tuple[str, ...]]]:
        """Pickle by the constructor's arguments, which are not the message."""
        return type(self), (self.where, self.problems)

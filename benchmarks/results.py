"""Where results come from and where they go: provenance and the JSON file."""

import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


class Refused(Exception):
    """Results would not say what they measured."""


def commit_of(root: Path, named: str | None, allow_dirty: bool) -> str:
    """The commit that is measured.

    Args:
      root: the checkout. Earlier results below it may be uncommitted.
      named: what to answer where there is no git metadata.
      allow_dirty: take a tree with uncommitted changes and mark the answer with "-dirty".

    Raises:
      Refused: the tree is dirty, or there is no git metadata and no name, or both disagree.
    """
    if not (root / ".git").exists():
        if named is None:
            raise Refused(f"{root} has no git metadata: name the commit with --commit")
        return named
    head = _git(root, "rev-parse", "HEAD")
    if named is not None and not head.startswith(named.removesuffix("-dirty")):
        raise Refused(f"--commit is {named}, but the checkout is at {head}")
    changes = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    if not changes:
        return head
    if not allow_dirty:
        raise Refused(f"uncommitted changes (--allow-dirty measures them all the same):\n{changes}")
    return f"{head}-dirty"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Refused(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def device_slug(kind: str) -> str:
    """A short name for files: "NVIDIA H100 80GB HBM3" is "h100"."""
    words = [w for w in re.findall(r"[a-z0-9]+", kind.lower()) if w not in ("nvidia", "geforce")]
    if words and re.fullmatch(r"[a-z]+\d+\w*", words[0]):
        return words[0]
    return "-".join(words)


@dataclass
class Results:
    """A result file that grows row by row.

    Until `finish` it has the suffix ``.partial.json``: what is left of a run that was cut off.

    Attributes:
      path: the final name.
      head: everything but the rows.
      rows: one dict per configuration.
    """

    path: Path
    head: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def partial(self) -> Path:
        """The name before `finish`."""
        return self.path.with_suffix(".partial.json")

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write what there is under the partial name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial.write_text(dumps({**self.head, "rows": self.rows}))

    def finish(self) -> Path:
        """Move the file to its final name."""
        self.write()
        return self.partial.rename(self.path)


def dumps(results: dict[str, Any]) -> str:
    """JSON with one line per row, so that differences between runs can be read."""
    head = json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=2)
    rows = ",\n".join(f"    {json.dumps(row)}" for row in results["rows"])
    return f'{head[:-2]},\n  "rows": [\n{rows}\n  ]\n}}\n'

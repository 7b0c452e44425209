"""The progress bar of commands that read or write whole checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from jax_mxfp4.checkpoints import Progress as Report


@contextmanager
def byte_progress(description: str) -> "Iterator[Report]":
    """A bar with bytes per second, on terminals only, where it leaves nothing behind."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=None)
        yield lambda _, done, total: bar.update(task, completed=done, total=total)

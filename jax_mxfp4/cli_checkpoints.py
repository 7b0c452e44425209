"""The commands of `jax-mxfp4` that work on checkpoint files: convert, inspect, verify, diff."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from jax_mxfp4.checkpoints import Progress as Report
    from jax_mxfp4.checkpoints.statistics import TensorSummary

_Source = Annotated[
    Path, typer.Argument(help="A checkpoint folder, or a file *.gguf.", show_default=False)
]
# As of diff(1): 1 means different, so that trouble needs another number.
_DIFFERENT, _TROUBLE = 1, 2
_WIDE = 200


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (convert, inspect, verify, diff):
        app.command()(command)


def convert(
    source: _Source,
    destination: Annotated[
        Path, typer.Argument(help="What to create: *.gguf, or a folder.", show_default=False)
    ],
    layout: Annotated[
        Literal["huggingface", "openai", "gguf"] | None,
        typer.Option(
            "--to", help="Layout of DESTINATION.", show_default="gguf for *.gguf, else huggingface"
        ),
    ] = None,
) -> None:
    """Write a GPT-OSS checkpoint in another layout; packed weights keep every bit."""
    from jax_mxfp4 import convert as conversion

    with _progress("converting") as report:
        conversion.convert(source, destination, layout, progress=report)
    Console(stderr=True).print(
        Text(f"{source} is now also {destination}"), soft_wrap=True, highlight=False
    )


def inspect(source: _Source) -> None:
    """List the tensors of a checkpoint; of packed ones also what their blocks hold."""
    from jax_mxfp4.checkpoints import open_checkpoint
    from jax_mxfp4.checkpoints.statistics import summarize

    table = Table(box=box.SIMPLE)
    table.add_column("tensor", no_wrap=True)
    for heading in ("dtype", "shape"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bytes", "scales", "NaN scales", "saturated", "zero"):
        table.add_column(heading, no_wrap=True, justify="right")
    total = 0
    for summary in summarize(open_checkpoint(source)):
        total += summary.nbytes
        table.add_row(*(Text(cell) for cell in _cells(summary)))
    console = _results()
    console.print(table)
    console.print(f"{table.row_count} tensors, {total:,} bytes")


def _cells(summary: "TensorSummary") -> tuple[str, ...]:
    shape = " x ".join(str(size) for size in summary.shape)
    # repr: a name can hold any character, also such as would clear a terminal.
    cells = (repr(summary.name)[1:-1], summary.dtype, shape, f"{summary.nbytes:,}")
    packed = summary.packed
    if packed is None or packed.elements == 0:
        return (*cells, "", "", "", "")
    scales = "-".join(map(str, packed.scale_range)) if packed.scale_range else "none"
    saturated, zero = (
        f"{count / packed.elements:.2%}" for count in (packed.saturated, packed.zeros)
    )
    return (*cells, scales, f"{packed.nan_scales:,}", saturated, zero)


def verify(source: _Source) -> None:
    """Check a GPT-OSS checkpoint: structure, shapes against its configuration, NaN."""
    from jax_mxfp4 import inspection

    with _progress("reading") as report:
        found = inspection.verify(source, report)
    typer.echo(
        f"no faults: {found.tensors} tensors, {found.parameters:,} parameters, "
        f"{found.nbytes:,} bytes"
    )


def diff(
    left: _Source,
    right: Annotated[Path, typer.Argument(help="The other one.", show_default=False)],
) -> None:
    """Compare the values of two GPT-OSS checkpoints; exit status 0 equal, 1 not, 2 trouble."""
    from jax_mxfp4 import inspection
    from jax_mxfp4.checkpoints import CheckpointError

    table = Table(box=box.SIMPLE)
    table.add_column("parameter", no_wrap=True)
    for heading in ("values", "different", "largest error", "relative error"):
        table.add_column(heading, no_wrap=True, justify="right")
    try:
        with _progress("comparing") as report:
            found = list(inspection.diff(left, right, report))
    except CheckpointError as error:
        typer.echo(f"jax-mxfp4: error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(_TROUBLE) from error
    unequal = [difference for difference in found if difference.different]
    for difference in unequal:
        table.add_row(
            difference.name,
            f"{difference.elements:,}",
            f"{difference.different:,}",
            f"{difference.largest:.3g}",
            f"{difference.relative:.3g}",
        )
    console = _results()
    if unequal:
        console.print(table)
    console.print(f"{len(found) - len(unequal)} of {len(found)} parameters are equal")
    if unequal:
        raise typer.Exit(_DIFFERENT)


def _results() -> Console:
    """A console for stdout that cuts nothing off where that is a file."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=_WIDE)


@contextmanager
def _progress(description: str) -> "Iterator[Report]":
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

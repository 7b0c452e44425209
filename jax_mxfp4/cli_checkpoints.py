"""The commands of `jax-mxfp4` that examine checkpoint files: inspect, verify, diff."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_mxfp4.cli_progress import byte_progress

if TYPE_CHECKING:
    from jax_mxfp4.checkpoints.statistics import TensorSummary
    from jax_mxfp4.inspection import Verified

_Source = Annotated[
    Path, typer.Argument(help="A checkpoint folder, or a file *.gguf.", show_default=False)
]
# As of diff(1): 1 means different, so that trouble needs another number.
_DIFFERENT, _TROUBLE = 1, 2
_WIDE = 200


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (inspect, verify, diff):
        app.command()(command)


def inspect(
    source: _Source,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Also write the distributions of weights and scales as a picture.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the tensors of a checkpoint; of packed ones also what their blocks hold."""
    from jax_mxfp4.checkpoints import open_checkpoint
    from jax_mxfp4.checkpoints.statistics import summarize

    if plot is not None:  # what is wrong with it is better known before everything is read
        from jax_mxfp4.inspection.plots import require_picture

        require_picture(plot)
    table = Table(box=box.SIMPLE)
    table.add_column("tensor", no_wrap=True)
    for heading in ("dtype", "shape"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bytes", "scales", "NaN scales", "saturated", "zero"):
        table.add_column(heading, no_wrap=True, justify="right")
    with byte_progress("reading") as report:
        summaries = list(summarize(open_checkpoint(source), report))
    for summary in summaries:
        table.add_row(*(Text(cell) for cell in _cells(summary)))
    console = _results()
    console.print(table)
    total = sum(summary.nbytes for summary in summaries)
    console.print(f"{table.row_count} tensors, {total:,} bytes")
    if plot is not None:
        from jax_mxfp4.inspection.plots import plot_distributions

        plot_distributions(summaries, plot, str(source))


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
    """Check a checkpoint: structure, shapes against its configuration, NaN, checksums."""
    from jax_mxfp4 import inspection

    with byte_progress("reading") as report:
        found = inspection.verify(source, report)
    typer.echo(
        f"no faults: {found.tensors} tensors, {found.parameters:,} parameters, "
        f"{found.nbytes:,} bytes"
    )
    if found.unchecked is not None:
        typer.echo(f"not checked: {found.unchecked}")
    _echo_checksums(found)


def _echo_checksums(found: "Verified") -> None:
    """Say which files have the checksum that is recorded, and the checksums of the others."""
    for record in sorted({where for one in found.checksums for where in one.recorded}):
        count = sum(record in one.recorded for one in found.checksums)
        files = "1 file is" if count == 1 else f"{count} files are"
        typer.echo(f"checksums: {files} as recorded in {record}")
    unrecorded = [one for one in found.checksums if not one.recorded]
    if unrecorded:
        typer.echo("no checksum is recorded of:")
    for one in unrecorded:  # in the form of sha256sum
        typer.echo(f"{one.found}  {repr(one.file.name)[1:-1]}")


def diff(
    left: _Source,
    right: Annotated[Path, typer.Argument(help="The other one.", show_default=False)],
) -> None:
    """Compare the values of two checkpoints; exit status 0 equal, 1 not, 2 trouble."""
    from jax_mxfp4 import inspection
    from jax_mxfp4.checkpoints import CheckpointError

    table = Table(box=box.SIMPLE)
    table.add_column("parameter", no_wrap=True)
    for heading in ("values", "different", "largest error", "relative error"):
        table.add_column(heading, no_wrap=True, justify="right")
    try:
        with byte_progress("comparing") as report:
            found = list(inspection.diff(left, right, report))
    except CheckpointError as error:
        typer.echo(f"jax-mxfp4: error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(_TROUBLE) from error
    unequal = [difference for difference in found if difference.different]
    for difference in unequal:
        table.add_row(
            Text(repr(difference.name)[1:-1]),
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

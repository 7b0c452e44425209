"""What the commands of `jax-mxfp4 eval` share: options, tables, result files, progress."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jax_mxfp4.cli_models import DEFAULT, NAMES

if TYPE_CHECKING:
    from jax_mxfp4.validation.judges import Judge

Item = TypeVar("Item")
_WIDE = 200

ModelOption = Annotated[
    Path | None,
    typer.Option(
        help="A GPT-OSS checkpoint, also one with dense experts, a GGUF file of a Llama model, or "
        f"the name of a built-in model: {NAMES}.",
        show_default=DEFAULT,
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", help="A text in UTF-8.", show_default="a built-in excerpt"),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(help="Of everything that is not packed."),
]
ImplementationOption = Annotated[
    Literal["cuda", "reference", "dense"] | None,
    typer.Option(
        help="Of the packed operations; dense decodes all weights first.",
        show_default="by platform",
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result there.", show_default=False)
]


def load(model: Path | None, dtype: str, implementation: Any) -> "Judge":
    """Load a model; see `load_judge`, whose packages take a while to import."""
    from jax_mxfp4.validation.judges import load_judge

    return load_judge(model, dtype, implementation)


def new_table(first: str, *headings: str) -> Table:
    """Return a table of names and numbers."""
    table = Table(box=box.SIMPLE)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def show(table: Table, head: Mapping[str, Any]) -> None:
    """Print a table below everything that says how it was measured."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a file cuts nothing off
        console = Console(highlight=False, markup=False, width=_WIDE)
    for key, value in head.items():
        console.print(f"{key}: {'none' if value is None else value}", soft_wrap=True)
    console.print(table)


def write(path: Path | None, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the same as JSON, where a path is given."""
    from jax_mxfp4.validation.results import write_json

    if path is not None:
        write_json(path, head, rows)


def track(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    """Count items on a terminal as they come."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield from bar.track(items, total=total, description=description)

"""The commands `jax-mxfp4 eval ...` that measure accuracy, of formats and of models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jax_mxfp4 import cli_eval_agreement
from jax_mxfp4.cli_eval_common import (
    DtypeOption,
    ImplementationOption,
    JsonOption,
    ModelOption,
    TextOption,
    load,
    new_table,
    show,
    track,
    write,
)

if TYPE_CHECKING:
    from jax_mxfp4.validation.errors import TensorError
    from jax_mxfp4.validation.formats import Format
    from jax_mxfp4.validation.judges import Judge
    from jax_mxfp4.validation.scoring import Distance, Likelihood
    from jax_mxfp4.validation.windows import Windows

_Window = Annotated[int, typer.Option(help="Tokens in a window.")]
_Stride = Annotated[
    int | None,
    typer.Option(help="Tokens from one window to the next.", show_default="the window"),
]
_Bos = Annotated[int | None, typer.Option(help="Id that begins every window.", show_default="none")]
_MaxTokens = Annotated[int, typer.Option(help="Use so many tokens of the text, 0 for all.")]
_Batch = Annotated[int, typer.Option(help="Windows at a time.", min=1)]
_Weights = Annotated[
    str | None,
    typer.Option(
        help="Quantize the matrices whose names this regular expression matches.",
        show_default="linear layers and experts that are not MXFP4 in the checkpoint already",
    ),
]
_TieMargin = Annotated[
    float, typer.Option(help="Leave out of top-1 where the two best logits are closer.", min=0)
]
_Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="Also draw it there: *.svg, *.png, *.pdf.", show_default=False),
]


_QUALITY = ("perplexity", "change", "KL", "KL 99 %", "top-1")


def register(app: typer.Typer) -> None:
    """Add the group of commands to `app`."""
    group = typer.Typer(no_args_is_help=True)
    for command in (perplexity, compare, sensitivity, sqnr):
        group.command()(command)
    cli_eval_agreement.register(group)
    app.add_typer(group, name="eval", help="Measure accuracy: of formats, models, devices.")


def perplexity(
    model: ModelOption = None,
    text: TextOption = None,
    window: _Window = 256,
    stride: _Stride = None,
    bos: _Bos = None,
    max_tokens: _MaxTokens = 0,
    dtype: DtypeOption = "float32",
    implementation: ImplementationOption = None,
    against: ImplementationOption = None,
    batch: _Batch = 8,
    json: JsonOption = None,
) -> None:
    """Perplexity in sliding windows; with --against also of another implementation."""
    from jax_mxfp4.validation.scoring import likelihood

    judges = [load(model, dtype, implementation)]
    if against is not None:
        judges.append(load(model, dtype, against))
    task = _task(judges[0], text, (window, stride, bos, max_tokens))
    table = new_table("implementation", "perplexity", "standard error", "difference")
    rows: list[dict[str, Any]] = []
    for judge, name in zip(judges, (implementation, against), strict=False):
        found = likelihood(judge.model, task.windows, batch)
        label = name or "by platform"
        rows.append({"implementation": label, **_likelihood_row(found)})
        change = found.perplexity / rows[0]["perplexity"] - 1
        rows[-1]["relative_change"] = change
        error = found.perplexity * found.standard_error
        table.add_row(label, f"{found.perplexity:.4f}", f"{error:.2f}", f"{change:+.2e}")
    show(table, {**task.head, "dtype": dtype})
    write(json, {**task.head, "dtype": dtype}, rows)


def compare(
    model: ModelOption = None,
    text: TextOption = None,
    formats: Annotated[
        str | None, typer.Option(help="Names, separated by commas.", show_default="all")
    ] = None,
    weights: _Weights = None,
    window: _Window = 256,
    stride: _Stride = None,
    bos: _Bos = None,
    max_tokens: _MaxTokens = 16384,
    batch: _Batch = 8,
    tie_margin: _TieMargin = 0.05,
    json: JsonOption = None,
    plot: _Plot = None,
) -> None:
    """Store a model's weights in each format in turn: bits, SQNR, perplexity, KL, top-1."""
    from jax_mxfp4.validation.comparison import FormatResult, compare_formats
    from jax_mxfp4.validation.models import select_matrices
    from jax_mxfp4.validation.plots import plot_formats
    from jax_mxfp4.validation.scoring import Baseline

    chosen = _formats(formats, "--formats")
    judge = load(model, "float32", "dense")
    matrices = select_matrices(judge.model, weights, judge.stored_packed)
    task = _task(judge, text, (window, stride, bos, max_tokens))
    head = {**task.head, **_weights_head(judge, matrices)}
    baseline = Baseline(judge.model, task.windows, batch, tie_margin)
    table = new_table("format", "bits", "SQNR dB", *_QUALITY)
    table.add_row("unquantized", "", "", f"{baseline.likelihood.perplexity:.3f}", *[""] * 4)
    rows: list[dict[str, Any]] = [{"format": "unquantized", **_likelihood_row(baseline.likelihood)}]
    notes: list[str] = []
    results = compare_formats(judge.model, matrices, chosen, baseline)
    for result in track(results, "comparing", len(chosen)):
        if isinstance(result, FormatResult):
            quality = _quality(baseline.likelihood, result.likelihood, result.distance)
            bits = result.bits_per_weight
            table.add_row(result.format, f"{bits:.3f}", f"{result.error.sqnr_db:.2f}", *quality)
            row = {"format": result.format, "bits_per_weight": bits, **_error_row(result.error)}
            rows.append({**row, **_likelihood_row(result.likelihood), **vars(result.distance)})
        else:
            notes.append(f"{result.format} is not applicable: {result.reason}")
            rows.append({"format": result.format, "not_applicable": result.reason})
    head["tie_margin"] = tie_margin
    table.caption = "\n".join(notes)
    show(table, head)
    write(json, head, rows)
    if plot is not None:
        drawn = [row for row in rows if "kl" in row]
        columns = ([row[key] for row in drawn] for key in ("format", "bits_per_weight", "kl"))
        plot_formats(plot, f"{judge.name}: {head['text']}", *columns)


def sensitivity(
    model: ModelOption = None,
    text: TextOption = None,
    format: Annotated[str, typer.Option(help="That each part is stored in.")] = "mxfp4-even",
    by: Annotated[
        Literal["tensor", "layer", "kind"], typer.Option(help="What is a part.")
    ] = "tensor",
    weights: _Weights = None,
    window: _Window = 256,
    stride: _Stride = None,
    bos: _Bos = None,
    max_tokens: _MaxTokens = 8192,
    batch: _Batch = 8,
    tie_margin: _TieMargin = 0.05,
    json: JsonOption = None,
    plot: _Plot = None,
) -> None:
    """Quantize one part of a model at a time and rank the parts by KL."""
    from jax_mxfp4.validation.models import select_matrices
    from jax_mxfp4.validation.plots import plot_sensitivity
    from jax_mxfp4.validation.scoring import Baseline
    from jax_mxfp4.validation.sensitivity import group, sensitivities

    (chosen,) = _formats(format, "--format")
    judge = load(model, "float32", "dense")
    matrices = select_matrices(judge.model, weights, judge.stored_packed)
    task = _task(judge, text, (window, stride, bos, max_tokens))
    head = {**task.head, **_weights_head(judge, matrices), "format": format, "by": by}
    head["tie_margin"] = tie_margin
    baseline = Baseline(judge.model, task.windows, batch, tie_margin)
    head["unquantized_perplexity"] = baseline.likelihood.perplexity
    parts = sensitivities(judge.model, matrices, chosen.round, baseline, by)
    found = list(track(parts, "quantizing", len(group(matrices, by))))
    found.sort(key=lambda part: part.distance.kl, reverse=True)
    table = new_table("part", "weights", "SQNR dB", *_QUALITY)
    rows = []
    for part in found:
        quality = _quality(baseline.likelihood, part.likelihood, part.distance)
        table.add_row(part.part, f"{part.elements:,}", f"{part.error.sqnr_db:.2f}", *quality)
        row = {"part": part.part, "weights": part.elements, **_error_row(part.error)}
        rows.append({**row, **_likelihood_row(part.likelihood), **vars(part.distance)})
    show(table, head)
    write(json, head, rows)
    if plot is not None:
        kls = [part.distance.kl for part in found]
        plot_sensitivity(plot, f"{judge.name}, {format}", [part.part for part in found], kls)


def sqnr(
    formats: Annotated[
        str | None, typer.Option(help="Names, separated by commas.", show_default="all")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of 4096 values in an octave.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Of the random values.", min=0)] = 0,
    json: JsonOption = None,
) -> None:
    """SQNR in dB of each format on random data, averaged over an octave of scales."""
    from jax_mxfp4.validation.results import machine
    from jax_mxfp4.validation.synthetic import DISTRIBUTIONS, mean_sqnr_db, octave

    chosen = _formats(formats, "--formats")
    data = {name: octave(name, rows, seed=seed) for name in DISTRIBUTIONS}
    head = {**machine(), "rows_in_octave": rows, "columns": 4096, "seed": seed}
    table = new_table("format", "bits", *data)
    found: list[dict[str, Any]] = []
    for format in track(iter(chosen), "rounding", len(chosen)):
        bits = format.bits((rows, 4096))
        values = {name: mean_sqnr_db(format, x) for name, x in data.items()}
        table.add_row(format.name, f"{bits:.3f}", *(f"{v:.2f}" for v in values.values()))
        found.append({"format": format.name, "bits_per_weight": bits, **values})
    show(table, head)
    write(json, head, found)


@dataclass(frozen=True)
class _Task:
    """What a model is judged on: the windows, and all that describes the measurement."""

    windows: "Windows"
    head: dict[str, Any]


def _task(
    judge: "Judge", text: Path | None, numbers: tuple[int, int | None, int | None, int]
) -> _Task:
    """Cut a text by `numbers`, the window, stride, BOS id and token limit of the command line."""
    from jax_mxfp4.validation.results import machine, protocol_of
    from jax_mxfp4.validation.texts import read_text
    from jax_mxfp4.validation.windows import Protocol, split

    window, stride, bos, max_tokens = numbers
    room = window - (bos is not None)
    protocol = Protocol(window, room if stride is None else stride, bos, max_tokens or None)
    content = read_text(text)
    tokens = judge.encode(content.content)
    windows = split(tokens, protocol)
    head = {**machine(), "model": judge.name}
    return _Task(windows, {**head, **protocol_of(content, len(tokens), protocol, windows)})


def _formats(names: str | None, option: str) -> "list[Format]":
    from jax_mxfp4.validation.formats import FORMATS

    if names is None:
        return list(FORMATS.values())
    if unknown := [name for name in names.split(",") if name not in FORMATS]:
        raise typer.BadParameter(
            f"expected {', '.join(FORMATS)}, found {unknown[0]!r}", param_hint=f"'{option}'"
        )
    return [FORMATS[name] for name in names.split(",")]


def _weights_head(judge: "Judge", matrices: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "matrices": len(matrices),
        "weights": sum(matrix.size for matrix in matrices.values()),
        "matrices_stored_as_mxfp4": len(matrices.keys() & set(judge.stored_packed)),
    }


def _likelihood_row(found: "Likelihood") -> dict[str, Any]:
    return {
        "perplexity": found.perplexity,
        "mean_nll": found.mean,
        "standard_error": found.standard_error,
    }


def _error_row(error: "TensorError") -> dict[str, Any]:
    return {"sqnr_db": error.sqnr_db, "cosine": error.cosine, "largest_error": error.largest}


def _quality(base: "Likelihood", found: "Likelihood", distance: "Distance") -> tuple[str, ...]:
    return (
        f"{found.perplexity:.3f}",
        f"{found.perplexity / base.perplexity - 1:+.2%}",
        f"{distance.kl:.2e}",
        f"{distance.kl_99:.2e}",
        f"{distance.top1:.2%}",
    )

"""The commands `jax-mxfp4 eval ...` that compare: two implementations, two devices."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

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
    from jax_mxfp4.validation.judges import Judge


def register(group: typer.Typer) -> None:
    """Add the commands to `group`."""
    for command in (divergence, device_report, device_diff):
        group.command()(command)


def divergence(
    model: ModelOption = None,
    other_model: Annotated[
        Path | None, typer.Option(help="Another checkpoint.", show_default="the same")
    ] = None,
    dtype: DtypeOption = "float32",
    other_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the other one.", show_default="the same"),
    ] = None,
    implementation: ImplementationOption = "reference",
    other_implementation: ImplementationOption = "dense",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative RMS error.", show_default="1e-5, or 0.05 with a 16-bit dtype"
        ),
    ] = None,
    route_freely: Annotated[
        bool, typer.Option(help="Let the other one choose its own experts.")
    ] = False,
    text: TextOption = None,
    tokens: Annotated[int, typer.Option(help="Of the text.", min=1)] = 256,
    json: JsonOption = None,
) -> None:
    """Run two GPT-OSS models layer by layer; exit status 1 where they diverge.

    The experts that the first model chooses are used in both: with almost equal scores the
    smallest error could change the choice, and hide what is to be found.
    """
    from jax_mxfp4.validation.divergence import compare_captures, first_divergence
    from jax_mxfp4.validation.results import machine
    from jax_mxfp4.validation.texts import read_text

    second_dtype = other_dtype or dtype
    if tolerance is None:
        tolerance = 1e-5 if dtype == second_dtype == "float32" else 0.05
    judge = load(model, dtype, implementation)
    other = load(other_model or model, second_dtype, other_implementation)
    content = read_text(text)
    expected, actual = _captures(judge, other, content.content, tokens, route_freely)
    errors = compare_captures(expected, actual, tolerance)
    first = first_divergence(errors)
    head = {
        **machine(),
        "expected": f"{judge.name}, {dtype}, {implementation or 'by platform'}",
        "actual": f"{other.name}, {second_dtype}, {other_implementation or 'by platform'}",
        "text": content.form,
        "tokens": tokens,
        "tolerance": tolerance,
        "first_divergence": first and first.name,
    }
    table = new_table("result", "relative RMS", "largest", "cosine", "")
    rows = []
    for layer in errors:
        error = layer.accumulated
        mark = "beyond" if layer.beyond else ""
        table.add_row(
            layer.name,
            f"{error.relative_rms:.2e}",
            f"{error.largest:.2e}",
            f"{error.cosine:.6f}",
            mark,
        )
        row = {"result": layer.name, "relative_rms": error.relative_rms, "beyond": layer.beyond}
        rows.append({**row, "largest": error.largest, "cosine": error.cosine})
    show(table, head)
    write(json, head, rows)
    if first is not None:
        raise typer.Exit(1)


def device_report(
    output: Annotated[Path, typer.Argument(help="The JSON file to create.", show_default=False)],
    implementations: Annotated[
        str | None,
        typer.Option(
            help="reference, cuda, or both, separated by a comma.",
            show_default="all that run here",
        ),
    ] = None,
) -> None:
    """Run the numerical suite on this device: errors and hashes of every result."""
    from jax_mxfp4 import ops
    from jax_mxfp4.doctor import default_implementation
    from jax_mxfp4.validation.device_report import run_suite, to_rows
    from jax_mxfp4.validation.results import machine

    if implementations is None:
        implementations = "reference,cuda" if default_implementation() == "cuda" else "reference"
    names: list[ops.Implementation] = []
    for name in implementations.split(","):
        if name not in ("reference", "cuda"):
            raise typer.BadParameter(
                f"expected reference or cuda, found {name!r}", param_hint="'--implementations'"
            )
        names.append(name)
    head = machine()
    table = new_table("case", "dtype", "implementation", "relative RMS", "largest", "sha256")
    records = list(track(run_suite(names), "running", None))
    for record in records:
        error = record.relative_rms
        shown = ("", "") if error is None else (f"{error:.2e}", f"{record.largest:.2e}")
        digest = record.sha256[:12]
        table.add_row(record.case, record.dtype, record.implementation, *shown, digest)
    show(table, head)
    write(output, head, to_rows(records))


def device_diff(
    left: Annotated[Path, typer.Argument(help="Of one device.", show_default=False)],
    right: Annotated[Path, typer.Argument(help="Of the other one.", show_default=False)],
    json: JsonOption = None,
) -> None:
    """Tabulate how two device reports differ; exit status 0 if every bit is the same, else 1."""
    from jax_mxfp4.validation.device_report import compare_reports, read_report

    (one, left_records), (other, right_records) = read_report(left), read_report(right)
    differences = compare_reports(left_records, right_records)
    identical = sum(difference.identical for difference in differences)
    head = {
        "left": f"{one.get('device')}, jax {one.get('jax')}, {one.get('date')}",
        "right": f"{other.get('device')}, jax {other.get('jax')}, {other.get('date')}",
        "identical": f"{identical} of {len(differences)}",
    }
    table = new_table("case", "bits", "error left", "error right", "largest sampled difference")
    for difference in differences:
        errors = ("" if e is None else f"{e:.3e}" for e in (difference.left, difference.right))
        bits = "identical" if difference.identical else "different"
        table.add_row(difference.case, bits, *errors, f"{difference.largest:.2e}")
    show(table, head)
    write(json, head, [vars(difference) for difference in differences])
    if identical < len(differences):
        raise typer.Exit(1)


def _captures(
    judge: "Judge", other: "Judge", text: str, tokens: int, route_freely: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run both models on the beginning of a text and return what their layers compute."""
    import jax.numpy as jnp

    from jax_mxfp4.models.gpt_oss import GptOss
    from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss, capture

    def run(side: "Judge", routing: list[Any] | None) -> dict[str, Any]:
        if not isinstance(side.model, GptOss | DenseGptOss):
            raise ValueError(f"{side.name}: expected a GPT-OSS model, found another one")
        return capture(side.model, ids, routing)

    ids = jnp.asarray([judge.encode(text)[:tokens]], jnp.int32)
    expected = run(judge, None)
    routing = [value for name, value in expected.items() if name.endswith("router_indices")]
    return expected, run(other, None if route_freely else routing)

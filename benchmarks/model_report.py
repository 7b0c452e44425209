"""Results of the expert layer and of whole models as tables."""

from typing import Any

from report import Results, title, warnings
from rich.table import Table


def table(results: Results) -> Table:
    """The rows of a moe or gpt_oss result; the title names device, commit and roofs."""
    rows = results["rows"]
    timed = [row for row in rows if row.get("phase") != "prefill"]
    out = Table(title=title(results), caption=warnings(timed))
    if rows and rows[0]["op"] == "moe":
        _moe_table(out, rows)
    else:
        _model_table(out, rows)
    return out


def breakdown(row: dict[str, Any]) -> Table:
    """The kernels of one row, the longest first."""
    total = sum(kernel["us"] for kernel in row["kernels"])
    out = Table(
        title=f"{row['model']} {row['phase']}, batch {row['batch']}, {row['context']}: kernels "
        f"take {total * 1e-3:.3f} of {row['ms']:.3f} ms"
    )
    out.add_column("kernel")
    for name in ("calls", "us", "of all"):
        out.add_column(name, justify="right")
    for kernel in row["kernels"]:
        share = f"{kernel['us'] / total:.1%}"
        out.add_row(kernel["kernel"], f"{kernel['calls']:g}", f"{kernel['us']:.1f}", share)
    return out


def _moe_table(out: Table, rows: list[dict[str, Any]]) -> None:
    for name in ("experts", "tokens", "active", "floor us", "us (min-max)", "GB/s", "TFLOP/s"):
        out.add_column(name, justify="right")
    out.add_column("of roof", justify="right")
    for row in rows:
        out.add_row(
            str(row["experts"]),
            str(row["tokens"]),
            str(row["active_experts"]),
            f"{row['floor_us']:.1f}",
            f"{row['us']:.1f} ({row['us_min']:.1f}-{row['us_max']:.1f})",
            f"{row['gbs']:.0f}",
            f"{row['tflops']:.0f}",
            f"{row['roof_fraction']:.0%}",
        )


def _model_table(out: Table, rows: list[dict[str, Any]]) -> None:
    out.add_column("model")
    out.add_column("phase")
    for name in ("batch", "context", "tokens/s", "ms (min-max)", "floor ms", "of roof", "peak GB"):
        out.add_column(name, justify="right")
    for row in rows:
        out.add_row(
            row["model"],
            row["phase"],
            str(row["batch"]),
            str(row["context"]),
            f"{row['tokens_per_s']:,.1f}",
            f"{row['ms']:.3f} ({row['ms_min']:.3f}-{row['ms_max']:.3f})",
            f"{row['floor_ms']:.3f}",
            f"{row['roof_fraction']:.0%}",
            "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}",
        )

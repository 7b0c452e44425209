"""Results as a table and as a roofline plot."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]
Results = dict[str, Any]

_COLOURS = {"jax_mxfp4": "C0", "cublas_bf16": "C1"}


def table(results: Results) -> Table:
    """The rows of a matmul or unpack result; the title names device, commit and roofs."""
    out = Table(title=title(results), caption=warnings(results["rows"]))
    rows: list[Row] = results["rows"]
    if any(row["op"] == "matmul" for row in rows):
        _matmul_table(out, results)
    else:
        _unpack_table(out, rows)
    return out


def title(results: Results) -> str:
    """One line on what was measured and on which device."""
    commit, *dirty = results["commit"].split("-", 1)
    return (
        f"{results['device']}, commit {'-'.join([commit[:12], *dirty])}, {results['date']}: "
        f"HBM read {results['hbm_read_gbs']:.0f} GB/s, copy {results['hbm_copy_gbs']:.0f} GB/s, "
        f"bf16 {results['bf16_tflops']:.0f} TFLOP/s"
    )


def warnings(rows: Iterable[Row]) -> str | None:
    """What must be known before the numbers are believed, or None."""
    rows = list(rows)
    loose = sum(row["one_graph"] is False for row in rows)
    unknown = sum(row["one_graph"] is None for row in rows)
    slow_host = sum(row["host_bound"] for row in rows)
    notes = [
        f"{loose} rows did not run in one CUDA graph" if loose else "",
        f"of {unknown} rows it is not known whether they ran in one CUDA graph" if unknown else "",
        f"{slow_host} rows were limited by the host" if slow_host else "",
    ]
    return "; ".join(filter(None, notes)) or None


def throughput(row: Row, results: Results) -> str:
    """TFLOP/s where arithmetic is the limit, GB/s where reading is."""
    arithmetic_us = row["tflops"] * row["us"] / results["bf16_tflops"]
    reading_us = row["gbs"] * row["us"] / results["hbm_read_gbs"]
    if arithmetic_us > reading_us:
        return f"{row['tflops']:.0f} TFLOP/s"
    return f"{row['gbs']:.0f} GB/s"


def _matmul_table(out: Table, results: Results) -> None:
    rows: list[Row] = results["rows"]
    for name in ("shape", "N x K", "M", "floor us", "us (min-max)", "", "of roof"):
        out.add_column(name, justify="right" if name != "shape" else "left")
    out.add_column("cuBLAS bf16 us", justify="right")
    out.add_column("speed / cuBLAS", justify="right")
    cublas = {(r["name"], r["M"]): r for r in rows if r["impl"] == "cublas_bf16"}
    name = None
    for row in rows:
        if row["impl"] != "jax_mxfp4":
            continue
        if name not in (None, row["name"]):
            out.add_section()
        name = row["name"]
        peer = cublas.get((row["name"], row["M"]))
        out.add_row(
            row["name"],
            f"{row['N']} x {row['K']}",
            str(row["M"]),
            f"{row['floor_us']:.2f}",
            f"{row['us']:.2f} ({row['us_min']:.2f}-{row['us_max']:.2f})",
            throughput(row, results),
            f"{row['roof_fraction']:.0%}",
            f"{peer['us']:.2f}" if peer else "",
            f"{peer['us'] / row['us']:.2f}" if peer else "",
        )


def _unpack_table(out: Table, rows: list[Row]) -> None:
    out.add_column("op")
    out.add_column("what")
    for name in ("rows x K", "us (min-max)", "GB/s", "of copy roof"):
        out.add_column(name, justify="right")
    for row in rows:
        out.add_row(
            row["op"],
            row["name"],
            f"{row['rows']} x {row['K']}",
            f"{row['us']:.2f} ({row['us_min']:.2f}-{row['us_max']:.2f})",
            f"{row['gbs']:.0f}",
            f"{row['roof_fraction']:.0%}",
        )


def plot(results: Results, path: Path) -> None:
    """Write a PNG: TFLOP/s over M for each shape, under the roof of reading and arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows: list[Row] = [row for row in results["rows"] if row["op"] == "matmul"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 3 * lines), squeeze=False, sharex=True
    )
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        mine = [row for row in rows if row["name"] == name]
        for impl in dict.fromkeys(row["impl"] for row in mine):
            of_impl = sorted((r for r in mine if r["impl"] == impl), key=lambda r: r["M"])
            ms = [row["M"] for row in of_impl]
            colour = _COLOURS.get(impl, "C2")
            roof = [row["tflops"] / row["roof_fraction"] for row in of_impl]
            axis.plot(ms, roof, "--", color=colour, linewidth=0.8)
            axis.plot(ms, [r["tflops"] for r in of_impl], "o-", color=colour, ms=3, label=impl)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{name} {mine[0]['N']} x {mine[0]['K']}", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("M")
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"{title(results)}; dashed: roof of each format", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)

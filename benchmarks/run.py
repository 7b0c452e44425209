"""Benchmarks on the device that JAX uses.

    python benchmarks/run.py matmul --plot docs/roofline.png
    python benchmarks/run.py unpack
    python benchmarks/run.py report benchmarks/results/2026-11-22-h100-matmul.json

`matmul` and `unpack` write benchmarks/results/DATE-DEVICE-COMMAND.json and print a table;
progress goes to stderr. Exit status: 0, 1 when something was wrong, out of time or not in one
CUDA graph, 2 when nothing was started.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from check import WrongResult
from matmul import CUBLAS_VARIANTS, OutOfTime, Settings, measure_shape
from report import plot, table
from results import RESULTS, ROOT, Refused, Results, commit_of, device_slug
from rich.console import Console
from roofs import Roofs, measure_roofs
from shapes import M_VALUES, ROTATION_BYTES, SHAPES
from unpack import UNPACKINGS, measure_unpackings

import jax_mxfp4 as mx


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(arguments)
    if args.command == "report":
        return _report(json.loads(args.file.read_text()), args.plot)
    try:
        commit = commit_of(ROOT, args.commit, args.allow_dirty)
        _require_device(args.allow_cpu)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _measure(args, commit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    common.add_argument("--quick", action="store_true", help="5 samples instead of 9")
    common.add_argument("--commit", help="what is measured, where there is no git metadata")
    common.add_argument("--allow-dirty", action="store_true", help="measure uncommitted changes")
    common.add_argument("--allow-cpu", action="store_true", help="for tests: without a GPU")
    common.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    common.add_argument("--calls", type=int, default=200, help="least calls in one program")
    common.add_argument(
        "--rotation-mib",
        type=float,
        default=ROTATION_BYTES / 2**20,
        help="least size of all copies",
    )
    common.add_argument("--roof-mib", type=int, default=512, help="size of the roofs' buffers")
    common.add_argument("--roof-gemm", type=int, default=8192, help="size of the roofs' product")

    matmul = commands.add_parser("matmul", parents=[common], help="matmul against cuBLAS")
    matmul.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    matmul.add_argument("--m", nargs="+", type=int, default=list(M_VALUES))
    matmul.add_argument("--cublas", choices=list(CUBLAS_VARIANTS), default="heuristic")
    matmul.add_argument("--plot", type=Path, metavar="PNG", help="write the roofline plot")

    unpack = commands.add_parser("unpack", parents=[common], help="dequantize and take")
    names = [u.name for u in UNPACKINGS]
    unpack.add_argument("--only", nargs="+", choices=names, default=names)

    report = commands.add_parser("report", help="table and plot of a result file")
    report.add_argument("file", type=Path)
    report.add_argument("--plot", type=Path, metavar="PNG", help="write the roofline plot")
    return parser


def _require_device(allow_cpu: bool) -> None:
    if jax.default_backend() == "gpu" and not mx.has_cuda_kernels():
        raise Refused("this installation of jax_mxfp4 has no CUDA kernels")
    if jax.default_backend() != "gpu" and not allow_cpu:
        raise Refused(
            f"JAX uses {jax.default_backend()}, not a GPU (--allow-cpu runs all the same)"
        )


def _measure(args: argparse.Namespace, commit: str) -> int:
    start = time.monotonic()
    settings = Settings(
        samples=5 if args.quick else 9,
        calls=args.calls,
        rotation_bytes=round(args.rotation_mib * 2**20),
        cublas=getattr(args, "cublas", "heuristic"),
        deadline=start + args.time_limit,
    )

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True)

    roofs = measure_roofs(
        buffer_bytes=args.roof_mib * 2**20, gemm_size=args.roof_gemm, samples=settings.samples
    )
    results = _results(args, commit, roofs)
    say(
        f"read {roofs.hbm_read_gbs:.0f} GB/s ({roofs.read_by}), copy {roofs.hbm_copy_gbs:.0f} "
        f"GB/s, bf16 {roofs.bf16_tflops:.0f} TFLOP/s"
    )
    try:
        for row in _rows(args, roofs, settings, say):
            results.add(row)
    except (WrongResult, OutOfTime) as error:
        print(f"error: {error}", file=sys.stderr)
        if results.rows:
            print(f"what there is: {results.partial}", file=sys.stderr)
            Console().print(table({**results.head, "rows": results.rows}))
        return 1
    say(f"wrote {results.finish()}")
    return _report({**results.head, "rows": results.rows}, getattr(args, "plot", None))


def _rows(args: argparse.Namespace, roofs: Roofs, settings: Settings, say: Any) -> Iterator[Any]:
    if args.command == "unpack":
        chosen = tuple(u for u in UNPACKINGS if u.name in args.only)
        yield from measure_unpackings(chosen, roofs, settings, say)
        return
    for name in args.shapes:
        yield from measure_shape(SHAPES[name], args.m, roofs, settings, say)


def _results(args: argparse.Namespace, commit: str, roofs: Roofs) -> Results:
    device = jax.devices()[0]
    now = datetime.now(UTC)
    slug = device_slug(device.device_kind)
    head = {
        "device": device.device_kind,
        "commit": commit,
        "date": now.isoformat(timespec="seconds"),
        "jax": jax.__version__,
        "runtime": " ".join(device.client.platform_version.split()),
        "hbm_read_gbs": round(roofs.hbm_read_gbs, 1),
        "hbm_copy_gbs": round(roofs.hbm_copy_gbs, 1),
        "bf16_tflops": round(roofs.bf16_tflops, 1),
        "read_by": roofs.read_by,
    }
    return Results(args.out / f"{now:%Y-%m-%d}-{slug}-{args.command}.json", head)


def _report(results: dict[str, Any], png: Path | None) -> int:
    Console(width=140 if not sys.stdout.isatty() else None).print(table(results))
    if png is not None:
        plot(results, png)
    return int(any(row["one_graph"] is False for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())

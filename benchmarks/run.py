"""Benchmarks on the device that JAX uses.

    python benchmarks/run.py matmul --plot docs/roofline.png
    python benchmarks/run.py unpack
    python benchmarks/run.py moe
    python benchmarks/run.py gpt_oss --random-weights 20b 120b
    python benchmarks/run.py load --layouts huggingface gguf
    python benchmarks/run.py report benchmarks/results/2026-11-23-h100-matmul.json

All but `report` write benchmarks/results/DATE-DEVICE-COMMAND.json and print a table; progress goes
to stderr. Exit status: 0, 1 when something was wrong, out of time or not in one CUDA graph, 2 when
nothing was started.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import jax
from check import WrongResult
from gpt_oss import BATCHES, CONTEXTS, PROMPTS, Plan, measure_model
from load import LAYOUTS, load_table, measure_load
from matmul import CUBLAS_VARIANTS, OutOfTime, Settings, measure_shape
from model_costs import parameter_bytes
from model_report import breakdown
from model_report import table as model_table
from moe import EXPERTS, TOKENS, Layer, measure_layer
from report import plot, table
from results import RESULTS, ROOT, Refused, Results, commit_of, device_slug
from rich.console import Console
from roofs import Roofs, measure_roofs
from shapes import M_VALUES, ROTATION_BYTES, SHAPES
from timing import Unsteady
from unpack import UNPACKINGS, measure_unpackings

import jax_mxfp4 as mx
from jax_mxfp4.models.gpt_oss import GptOss
from jax_mxfp4.models.gpt_oss.released import ReleasedModel, random_params, released_config


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(arguments)
    if args.command == "report":
        return _report(json.loads(args.file.read_text()), args.plot)
    try:
        commit = commit_of(ROOT, args.commit, args.allow_dirty)
        if args.command == "load":
            return _measure_load(args, commit)
        _require_device(args.allow_cpu)
        results = _results(args, commit)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return _measure(args, results)
    except Unsteady as error:  # of the roofs
        print(f"error: {error}", file=sys.stderr)
        return 1


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

    load = commands.add_parser("load", help="loading a checkpoint of the size of gpt-oss-20b")
    load.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["huggingface"])
    load.add_argument("--layers", type=int, default=24, help="fewer make a smaller checkpoint")
    load.add_argument("--samples", type=int, default=3, help="how often to load it")
    load.add_argument("--folder", type=Path, default=Path.cwd(), help="where there is room for it")
    load.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    load.add_argument("--commit", help="what is measured, where there is no git metadata")
    load.add_argument("--allow-dirty", action="store_true", help="measure uncommitted changes")

    moe = commands.add_parser("moe", parents=[common], help="the expert layer of GPT-OSS")
    moe.add_argument("--experts", nargs="+", type=int, default=list(EXPERTS))
    moe.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))

    gpt_oss = commands.add_parser("gpt_oss", parents=[common], help="decoding and prefill")
    source = gpt_oss.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--random-weights",
        nargs="+",
        choices=get_args(ReleasedModel),
        default=[],
        help="models of these sizes, their weights made on the device",
    )
    source.add_argument("--model", type=Path, help="a checkpoint")
    gpt_oss.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    gpt_oss.add_argument("--contexts", nargs="*", type=int, default=list(CONTEXTS))
    gpt_oss.add_argument("--prompts", nargs="*", type=int, default=list(PROMPTS))
    gpt_oss.add_argument("--cache-format", choices=["fp8", "mxfp4"], default=None)
    gpt_oss.add_argument(
        "--kernels", type=int, default=15, help="kinds of kernels in a row's breakdown, 0 for none"
    )
    gpt_oss.add_argument(
        "--append", action="store_true", help="keep today's rows of other models, same commit"
    )

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


def _measure(args: argparse.Namespace, results: Results) -> int:
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
    results.head |= {
        # Digits, not decimals: in tests a roof can be less than 0.1.
        "hbm_read_gbs": float(f"{roofs.hbm_read_gbs:.5g}"),
        "hbm_copy_gbs": float(f"{roofs.hbm_copy_gbs:.5g}"),
        "bf16_tflops": float(f"{roofs.bf16_tflops:.5g}"),
        "read_by": roofs.read_by,
    }
    say(
        f"read {roofs.hbm_read_gbs:.0f} GB/s ({roofs.read_by}), copy {roofs.hbm_copy_gbs:.0f} "
        f"GB/s, bf16 {roofs.bf16_tflops:.0f} TFLOP/s"
    )
    try:
        for row in _rows(args, roofs, settings, say):
            results.add(row)
    except (WrongResult, OutOfTime, Unsteady) as error:
        print(f"error: {error}", file=sys.stderr)
        if results.rows:
            print(f"what there is: {results.partial}", file=sys.stderr)
            _print({**results.head, "rows": results.rows})
        return 1
    say(f"wrote {results.finish()}")
    return _report({**results.head, "rows": results.rows}, getattr(args, "plot", None))


def _measure_load(args: argparse.Namespace, commit: str) -> int:
    start = time.monotonic()
    device = jax.devices()[0]
    now = datetime.now(UTC)
    head = {
        "device": device.device_kind,
        "commit": commit,
        "date": now.isoformat(timespec="seconds"),
        "jax": jax.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    results = Results(
        args.out / f"{now:%Y-%m-%d}-{device_slug(device.device_kind)}-load.json", head
    )
    for layout in args.layouts:
        results.add(
            measure_load(
                layout,
                args.layers,
                args.folder,
                args.samples,
                lambda text: print(
                    f"[{time.monotonic() - start:4.0f} s] {text}", file=sys.stderr, flush=True
                ),
            )
        )
    print(f"wrote {results.finish()}", file=sys.stderr)
    return _report({**results.head, "rows": results.rows}, None)


def _rows(args: argparse.Namespace, roofs: Roofs, settings: Settings, say: Any) -> Iterator[Any]:
    if args.command == "unpack":
        chosen = tuple(u for u in UNPACKINGS if u.name in args.only)
        yield from measure_unpackings(chosen, roofs, settings, say)
    elif args.command == "moe":
        for experts in args.experts:
            layer = Layer(experts=experts)
            yield from measure_layer(layer, args.tokens, roofs, settings, say)
    elif args.command == "gpt_oss":
        plan = Plan(args.batches, args.contexts, args.prompts, args.cache_format, args.kernels)
        for name in _model_names(args):
            # Not kept in a variable: the next model may need the memory of this one.
            yield from measure_model(name, _model(args, name, say), plan, roofs, settings, say)
    else:
        for name in args.shapes:
            yield from measure_shape(SHAPES[name], args.m, roofs, settings, say)


def _model_names(args: argparse.Namespace) -> list[str]:
    return args.random_weights or [args.model.stem]


def _model(args: argparse.Namespace, name: Any, say: Any) -> GptOss:
    if args.model is not None:
        model = GptOss.from_pretrained(args.model)
    else:
        config = released_config(name)
        model = GptOss(random_params(config), config)
    say(f"{name}: {sum(parameter_bytes(model.params)) * 1e-9:.2f} GB of weights on the device")
    return model


def _results(args: argparse.Namespace, commit: str) -> Results:
    device = jax.devices()[0]
    now = datetime.now(UTC)
    slug = device_slug(device.device_kind)
    head = {
        "device": device.device_kind,
        "commit": commit,
        "date": now.isoformat(timespec="seconds"),
        "jax": jax.__version__,
        "runtime": " ".join(device.client.platform_version.split()),
    }
    results = Results(args.out / f"{now:%Y-%m-%d}-{slug}-{args.command}.json", head)
    if getattr(args, "append", False) and results.path.exists():
        earlier = json.loads(results.path.read_text())
        if earlier["commit"] != commit:
            raise Refused(f"--append: {results.path} is of commit {earlier['commit']}")
        results.rows = [row for row in earlier["rows"] if row["model"] not in _model_names(args)]
    return results


def _report(results: dict[str, Any], png: Path | None) -> int:
    _print(results)
    if png is not None:
        plot(results, png)
    return int(any(row.get("one_graph") is False for row in results["rows"]))


def _print(results: dict[str, Any]) -> None:
    console = Console(width=140 if not sys.stdout.isatty() else None)
    op = results["rows"][0]["op"]
    tables = {"load": load_table, "moe": model_table, "gpt_oss": model_table}
    console.print(tables.get(op, table)(results))
    if op == "gpt_oss":
        for row in filter(lambda row: row["kernels"], results["rows"]):
            console.print(breakdown(row))


if __name__ == "__main__":
    sys.exit(main())

"""What packing more of the built-in model mini costs in accuracy: its cache, its dense matrices.

    python benchmarks/mini_accuracy.py

writes benchmarks/results/DATE-DEVICE-mini_accuracy.json and prints two tables. The text is the one
that is part of the package. Cache: every token is decoded with the cache of all tokens before it.
Matrices: windows of 256 tokens.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from results import RESULTS, ROOT, Refused, Results, commit_of, device_slug
from rich.console import Console
from rich.table import Table

from jax_mxfp4.models.gpt_oss import GptOss, load_tokenizer, mini_path
from jax_mxfp4.models.gpt_oss.kv_formats import CacheFormat
from jax_mxfp4.models.gpt_oss.packing import DensePart
from jax_mxfp4.validation.texts import read_text

WINDOW = 256


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and print; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        commit = commit_of(ROOT, args.commit, args.allow_dirty)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = jax.devices()[0]
    now = datetime.now(UTC)
    text = read_text()
    tokens = np.asarray(load_tokenizer(mini_path()).encode(text.content).ids, np.int32)
    head = {
        "device": device.device_kind,
        "commit": commit,
        "date": now.isoformat(timespec="seconds"),
        "jax": jax.__version__,
        "text": text.form,
        "dtype": args.dtype,
    }
    name = f"{now:%Y-%m-%d}-{device_slug(device.device_kind)}-mini_accuracy.json"
    results = Results(args.out / name, head)
    model = GptOss.from_pretrained(mini_path(), args.dtype)
    for row in cache_rows(model, tokens[: args.context]):
        results.add(row)
    windows = tokens[: args.windows * WINDOW].reshape(-1, WINDOW)
    for row in packing_rows(partial(GptOss.from_pretrained, mini_path(), args.dtype), windows):
        results.add(row)
    print(f"wrote {results.finish()}", file=sys.stderr)
    for op in ("cache", "packing"):
        Console(width=120).print(_table(op, [row for row in results.rows if row["op"] == op]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=int, default=8192, help="tokens that are decoded")
    parser.add_argument("--windows", type=int, default=64, help="windows for packed matrices")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--commit", help="what is measured, where there is no git metadata")
    parser.add_argument("--allow-dirty", action="store_true", help="measure uncommitted changes")
    return parser


def cache_rows(model: GptOss, tokens: np.ndarray) -> list[dict[str, Any]]:
    """One row for each format of the cache, over all tokens [T] and over the last eighth."""
    formats: tuple[CacheFormat, ...] = (None, *get_args(get_args(CacheFormat)[0]))
    exact = decoded_logits(model, tokens, None)
    plain = model.init_cache(1, len(tokens)).nbytes
    rows = []
    for cache_format in formats:
        logits = exact if cache_format is None else decoded_logits(model, tokens, cache_format)
        nbytes = model.init_cache(1, len(tokens), cache_format).nbytes
        last = -max(2, len(tokens) // 8)
        rows.append(
            {
                "op": "cache",
                "name": cache_format or str(model.dtype),
                "context": len(tokens),
                "bytes": nbytes,
                "saved": round(1 - nbytes / plain, 4),
                **_distance(exact, logits, tokens),
                "last": _distance(exact[last:], logits[last:], tokens[last:]),
            }
        )
    return rows


@partial(jax.jit, static_argnames="cache_format")
def _decode_all(model: GptOss, tokens: jax.Array, cache_format: CacheFormat) -> jax.Array:
    def step(cache: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        logits, cache = model.decode_step(token[None], cache)
        return cache, logits[0]

    cache = model.init_cache(1, tokens.shape[0], cache_format)
    return jax.lax.scan(step, cache, tokens)[1]


def decoded_logits(model: GptOss, tokens: np.ndarray, cache_format: CacheFormat) -> np.ndarray:
    """The logits after each token [T], one decoding step each: float32 [T, V]."""
    return np.asarray(_decode_all(model, jnp.asarray(tokens), cache_format))


def packing_rows(load: Callable[..., GptOss], windows: np.ndarray) -> list[dict[str, Any]]:
    """One row for each set of packed parts, on windows [N, W] of tokens."""
    parts = get_args(DensePart)
    sets = [(), *combinations(parts, 1), parts]
    exact = _window_logits(load(), windows)
    rows = []
    for chosen in sets:
        model = load(pack=chosen)
        logits = exact if not chosen else _window_logits(model, windows)
        rows.append(
            {
                "op": "packing",
                "name": " + ".join(chosen) or "none",
                "tokens": windows.size,
                "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
                **_distance(exact, logits, windows),
            }
        )
    return rows


def _window_logits(model: GptOss, windows: np.ndarray) -> np.ndarray:
    batches = np.array_split(windows, max(1, len(windows) // 8))
    return np.concatenate([np.asarray(model(batch)) for batch in batches])


def _distance(exact: np.ndarray, found: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """KL(exact || found) in nats, agreement of the most likely token, and perplexity.

    Logits are [..., T, V], tokens [..., T].
    """
    p, q = (np.asarray(jax.nn.log_softmax(logits), np.float64) for logits in (exact, found))
    kl = np.sum(np.exp(p) * (p - q), axis=-1)
    nll = -np.take_along_axis(q[..., :-1, :], tokens[..., 1:, None], axis=-1)
    same = exact.argmax(axis=-1) == found.argmax(axis=-1)
    figures = {
        "kl": kl.mean(),
        "kl_99": np.percentile(kl, 99),
        "top1": same.mean(),
        "perplexity": np.exp(nll.mean()),
    }
    return {name: float(f"{value:.5g}") for name, value in figures.items()}


def _table(op: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title={"cache": "Format of the cache", "packing": "Packed matrices"}[op])
    table.add_column("")
    for name in ("MB", "saved", "KL", "99 % of KL below", "same top token", "perplexity"):
        table.add_column(name, justify="right")
    if op == "cache":
        table.add_column("KL of the last eighth", justify="right")
    for row in rows:
        last = [f"{row['last']['kl']:.2g}"] if op == "cache" else []
        table.add_row(
            row["name"],
            f"{row['bytes'] * 1e-6:.3f}",
            f"{1 - row['bytes'] / rows[0]['bytes']:.1%}",
            f"{row['kl']:.2g}",
            f"{row['kl_99']:.2g}",
            f"{row['top1']:.2%}",
            f"{row['perplexity']:.3f}",
            *last,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())

"""Write the tables of measured figures into the documents, from the JSON files that hold them.

    python docs/figures/tables.py

replaces, in every document of docs/, what stands between

    <!-- table NAME: FILE -->
    <!-- end -->

by the table NAME made from FILE (a path relative to the root of the repository). A test checks
that running this changes nothing. Needs no package.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARKED = re.compile(r"(<!-- table ([\w-]+): (\S+) -->\n).*?(<!-- end -->)", re.S)

Results = dict[str, Any]


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table; None is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [["" if cell is None else str(cell) for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def nested(corner: str, rows: dict[str, dict[str, object]]) -> str:
    """Format a dictionary of rows, each a dictionary of columns."""
    columns = list(next(iter(rows.values())))
    return markdown([corner, *columns], ([name, *row.values()] for name, row in rows.items()))


def scale_rules(results: Results) -> str:
    """SQNR of every scale rule on every distribution."""
    return nested("SQNR, dB", results["scale_rules"])


def gaussian_error(results: Results) -> str:
    """Kinds of error on Gaussian data, one column per rule."""
    by_rule = results["gaussian_error"]
    kinds = list(next(iter(by_rule.values())))
    return nested(
        "Gaussian data", {kind: {r: v[kind] for r, v in by_rule.items()} for kind in kinds}
    )


def block_sizes(results: Results) -> str:
    """SQNR for scale formats and block sizes, with bits per weight."""
    first, second = results["block_sizes"]
    rows = []
    for name, gaussian in results["block_sizes"][first].items():
        scale, block = name.split(", block ")
        student = results["block_sizes"][second][name]
        rows.append([scale, block, gaussian["bits"], gaussian["SQNR dB"], student["SQNR dB"]])
    return markdown(["scale", "block", "bits per weight", f"{first}, dB", f"{second}, dB"], rows)


def accumulation(results: Results) -> str:
    """Error of dot products by how they are summed."""
    return nested("RMS error of a dot product", results["accumulation"])


def attention(results: Results) -> str:
    """Error of one attention head."""
    return nested("logits", results["attention"])


def depth(results: Results) -> str:
    """Relative error of hidden states after some layers."""
    layers = (1, 2, 4, 8, 16, 32)
    rows = [[name, *(e[n - 1] for n in layers)] for name, e in results["depth"].items()]
    return markdown(["relative error after layer", *layers], rows)


def eval_sqnr(results: Results) -> str:
    """What `jax-mxfp4 eval sqnr` wrote."""
    names = [name for name in results["rows"][0] if name not in ("format", "bits_per_weight")]
    rows = [
        [row["format"], f"{row['bits_per_weight']:.3f}", *(f"{row[name]:.2f}" for name in names)]
        for row in results["rows"]
    ]
    return markdown(["SQNR, dB", "bits", *names], rows)


def eval_compare(results: Results) -> str:
    """What `jax-mxfp4 eval compare` wrote."""
    base, *others = results["rows"]
    rows: list[list[object]] = [
        ["unquantized", None, None, f"{base['perplexity']:.2f}", *[None] * 3]
    ]
    for row in others:
        if reason := row.get("not_applicable"):
            rows.append([row["format"], f"not applicable: {reason}", *[None] * 5])
            continue
        sqnr = "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.2f}"
        rows.append([row["format"], f"{row['bits_per_weight']:.3f}", sqnr, *_quality(base, row)])
    return markdown(["format", "bits", "SQNR, dB", "perplexity", "change", "KL", "top-1"], rows)


def eval_sensitivity(results: Results, count: int = 12) -> str:
    """The most sensitive parts that `jax-mxfp4 eval sensitivity` found."""
    base = {"perplexity": results["unquantized_perplexity"]}
    rows = [
        [row["part"], f"{row['weights']:,}", f"{row['sqnr_db']:.2f}", *_quality(base, row)]
        for row in results["rows"][:count]
    ]
    return markdown(["part", "weights", "SQNR, dB", "perplexity", "change", "KL", "top-1"], rows)


def gptq_layers(results: Results) -> str:
    """SQNR of layer outputs by plain rounding and by GPTQ, on real inputs."""
    columns = ["floor", "mse", "gptq, floor scales", "gptq", "gptq-rotated", "possible gain"]
    rows = [[row["layer"], *(f"{row[name]:.1f}" for name in columns)] for row in results["rows"]]
    return markdown(["SQNR of outputs, dB", *columns], rows)


def gptq_mini(results: Results) -> str:
    """Increase of perplexity of the model mini with rounded experts, on three texts."""
    texts = ["books_val", "wikitext2_test_detok", "wiki"]
    base = results["rows"][0]
    header = ["experts", "books", "WikiText-2, detokenized", "WikiText-2, raw"]
    rows = [["bfloat16: perplexity", *(f"{base[text]:.2f}" for text in texts)]]
    rows += [
        [row["experts"], *(f"{row[f'{text}_increase_percent']:+.2f} %" for text in texts)]
        for row in results["rows"][1:]
    ]
    return markdown(header, rows)


def gptq_model(results: Results) -> str:
    """Perplexity of a whole model by plain rounding and by GPTQ."""
    rows = [
        [row["weights"], f"{row['perplexity']:.2f}", f"{row['increase_percent']:+.1f} %"]
        for row in results["rows"]
    ]
    return markdown(["SmolLM2-135M", "perplexity", "change"], rows)


def training(results: Results) -> str:
    """What `examples/train_gpt_oss.py` trained, beside the model mini."""
    rows = [
        [
            *(row["model"], f"{row['bytes']:,}" if "bytes" in row else None),
            *(f"{row['perplexity']:.3f}", f"{row['perplexity_per_character']:.4f}"),
            f"{row['bits_per_byte']:.4f}",
        ]
        for row in results["rows"]
    ]
    columns = ["model", "bytes", "perplexity", "per character", "bits per byte"]
    return markdown(columns, rows)


def device_diff(results: Results) -> str:
    """What `jax-mxfp4 eval device-diff` found, operation by operation."""
    groups: dict[tuple[str, str, str], list[Results]] = {}
    for row in results["rows"]:
        case, dtype, implementation = row["case"].rsplit(", ", 2)
        # "matmul" of all sizes, but "logits of the model mini in float32" as it is.
        kind = re.findall(r"^\w+(?: of the .*)?", case)[0]
        groups.setdefault((kind, dtype, implementation), []).append(row)
    rows = []
    for group, found in groups.items():
        equal = f"{sum(row['identical'] for row in found)} of {len(found)}"
        errors = [
            f"{max(values):.2e}" if values else None
            for side in ("left", "right")
            for values in [[row[side] for row in found if row[side] is not None]]
        ]
        rows.append([*group, equal, *errors, f"{max(row['largest'] for row in found):.1e}"])
    sides = [
        f"error, {results[side].split(',')[0].removeprefix('NVIDIA ')}"
        for side in ("left", "right")
    ]
    columns = ["result", "dtype", "by", "same bits", *sides, "largest difference"]
    return markdown(columns, rows)


def device_perplexity(results: Results) -> str:
    """Perplexity of packed weights and of the same weights decoded, in a device report."""
    found: dict[str, dict[str, float]] = {}
    for row in results["rows"]:
        if row["case"].startswith("perplexity of "):
            dtype = row["case"].rsplit(" ", 1)[1]
            found.setdefault(dtype, {})[row["implementation"]] = row["sample"][0]
    rows = []
    for dtype, by in found.items():
        changes = (f"{by[name] / by['dense'] - 1:+.1e}" for name in ("reference", "cuda"))
        rows.append(
            [dtype, *(f"{by[name]:.4f}" for name in ("dense", "reference", "cuda")), *changes]
        )
    names = ["decoded", "packed, plain JAX", "packed, CUDA", "plain JAX: change", "CUDA: change"]
    return markdown(["dtype", *names], rows)


def mini_cache(results: Results) -> str:
    """What `benchmarks/mini_accuracy.py` found for formats of the key-value cache."""
    rows = [row for row in results["rows"] if row["op"] == "cache"]
    cells = [
        [
            *(row["name"], f"{row['bytes']:,}", f"{row['kl']:.1e}", f"{row['top1']:.1%}"),
            *(f"{row['perplexity']:.2f}", f"{row['last']['kl']:.1e}"),
        ]
        for row in rows
    ]
    columns = ["cache", "bytes", "KL", "top-1", "perplexity", "KL of the last eighth"]
    return markdown(columns, cells)


def mini_packing(results: Results) -> str:
    """What `benchmarks/mini_accuracy.py` found for packing matrices that are kept in bfloat16."""
    rows = [row for row in results["rows"] if row["op"] == "packing"]
    cells = [[row["name"], f"{row['bytes']:,}", *_quality(rows[0], row)] for row in rows]
    columns = ["also packed", "bytes", "perplexity", "change", "KL", "top-1"]
    return markdown(columns, cells)


def _quality(base: Results, row: Results) -> list[str]:
    """Perplexity, its relative change, KL and top-1 agreement."""
    change = row["perplexity"] / base["perplexity"] - 1
    return [
        f"{row['perplexity']:.2f}",
        f"{change:+.2%}",
        f"{row['kl']:.1e}",
        f"{row['top1']:.1%}",
    ]


def xla_cpu(results: Results) -> str:
    """Wrong answers of natural formulas on XLA's CPU backend."""
    return markdown([f"jax {results['jax']}, CPU", "wrong"], results["xla_cpu"].items())


def ptx_support(results: Results) -> str:
    """Smallest PTX version per instruction and target; families of targets share a column."""
    columns = {
        "7.5": ["sm_75"],
        "8.0": ["sm_80"],
        "8.6": ["sm_86"],
        "8.9": ["sm_89"],
        "9.0": ["sm_90", "sm_90a"],
        "10.0": ["sm_100", "sm_100a", "sm_100f"],
        "10.3": ["sm_103", "sm_103a", "sm_103f"],
        "11.0": ["sm_110", "sm_110a", "sm_110f"],
        "12.0": ["sm_120", "sm_120a", "sm_120f"],
        "12.1": ["sm_121", "sm_121a", "sm_121f"],
    }
    rows = []
    for name, found in results["smallest_ptx_version"].items():
        cells = []
        for targets in columns.values():
            generic, *specific = (found[t] for t in targets)
            versions = [v for v in specific if v]
            # A letter says that the generic target of that capability lacks the instruction.
            cells.append(generic or (f"{min(versions, key=float)} a" if versions else "-"))
        rows.append([name, *cells])
    return markdown(["instruction", *columns], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    function.__name__: function
    for function in (
        scale_rules,
        gaussian_error,
        block_sizes,
        accumulation,
        attention,
        depth,
        eval_sqnr,
        eval_compare,
        eval_sensitivity,
        gptq_layers,
        gptq_mini,
        gptq_model,
        training,
        device_diff,
        device_perplexity,
        mini_cache,
        mini_packing,
        xla_cpu,
        ptx_support,
    )
}


def fill(document: str) -> str:
    """Return the text of a document with every marked table made anew."""

    def replace(match: re.Match[str]) -> str:
        begin, name, file, end = match.groups()
        return begin + TABLES[name](json.loads((ROOT / file).read_text())) + end

    return MARKED.sub(replace, document)


def main() -> None:
    """Fill all documents in place."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()

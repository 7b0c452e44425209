"""What quantizers beyond plain rounding gain: on random data, on layers, on the model mini.

    python benchmarks/quantizers.py sqnr
    python benchmarks/quantizers.py mini enwiki_94_articles.txt
    python benchmarks/quantizers.py layers SmolLM2-135M-Instruct.Q4_1.gguf CALIBRATION TEST

print rows and write them to benchmarks/results, as quantizers-sqnr-DATE.json, gptq-mini-DATE.json
and gptq-layer-outputs-DATE.json. CALIBRATION and TEST are different texts.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from results import RESULTS, ROOT

import jax_mxfp4 as mx
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.models.gpt_oss import GptOss, load_tokenizer
from jax_mxfp4.models.llama import Llama
from jax_mxfp4.models.llama import load_tokenizer as load_llama_tokenizer
from jax_mxfp4.quantizers import (
    GptqOptions,
    calibrate_and_quantize,
    calibration_windows,
    diffuse_quantize,
    gptq,
    rotate,
    stochastic_quantize,
)
from jax_mxfp4.quantizers.gptq import damped
from jax_mxfp4.quantizers.hadamard import rotate_both
from jax_mxfp4.validation import Protocol, Windows, likelihood, split
from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss
from jax_mxfp4.validation.results import machine, write_json
from jax_mxfp4.validation.texts import read_text

Rows = Iterator[dict[str, Any]]

GOLDEN = ROOT / "tests" / "golden" / "mini-gptoss"
TEXTS = ("books_val", "wikitext2_test_detok", "wiki")
RULES: tuple[Literal["floor", "even", "mse"], ...] = ("floor", "even", "mse")
LAYERS = (0, 12, 25)  # of SmolLM2's 30
LAYER_WINDOWS = 128  # of 512 tokens that layers are calibrated on


def decode(w: MXFP4Array) -> jax.Array:
    """The values in float32."""
    return mx.dequantize(w, jnp.float32)


def sqnr_db(wanted: Any, found: Any) -> float:
    """Signal energy over error energy in dB, in float64."""
    wanted, found = np.asarray(wanted, np.float64), np.asarray(found, np.float64)
    return 10 * float(np.log10(np.sum(wanted**2) / np.sum((wanted - found) ** 2)))


def sqnr_rows() -> Rows:
    """One row for each quantizer that needs no calibration."""
    key = jax.random.key(0)
    quantizers: dict[str, Callable[[jax.Array], jax.Array]] = {
        "floor": lambda x: decode(mx.quantize(x, "floor")),
        "even": lambda x: decode(mx.quantize(x, "even")),
        "mse": lambda x: decode(mx.quantize(x, "mse")),
        "rotated, even": lambda x: rotate(decode(mx.quantize(rotate(x), "even"))),
        "rotated, mse": lambda x: rotate(decode(mx.quantize(rotate(x), "mse"))),
        "stochastic": lambda x: decode(stochastic_quantize(x, key)),
        "diffused": lambda x: decode(diffuse_quantize(x)),
    }

    def draw(name: str, seed: int) -> jax.Array:
        rng = np.random.default_rng(seed)
        shape = (512, 4096)
        x = rng.standard_t(3, shape) if name == "t3" else rng.standard_normal(shape)
        return jnp.asarray(x * 2.0 ** rng.uniform(0, 1, (512, 1)), jnp.float32)

    drawn = {name: [draw(name, seed) for seed in range(9)] for name in ("gaussian", "t3")}
    for quantizer, run in quantizers.items():
        row: dict[str, Any] = {"quantizer": quantizer}
        for name, matrices in drawn.items():
            found = [sqnr_db(x, run(x)) for x in matrices]
            row[f"{name}_median"] = round(float(np.median(found)), 3)
            row[f"{name}_min"] = round(min(found), 3)
        yield row


def mini_rows(calibration: Path) -> Rows:
    """One row for each way to round the experts of the model mini's bfloat16 original."""
    original = DenseGptOss.from_pretrained(GOLDEN / "bf16")
    ids = load_tokenizer(GOLDEN / "bf16").encode(read_text(calibration).content).ids
    golden = np.load(GOLDEN / "ppl_golden.npz")
    windows = {
        text: split(golden[f"{text}.tokens"].reshape(-1), Protocol(window=256, stride=256))
        for text in TEXTS
    }
    base = judge(original, windows)

    def row(name: str, model: GptOss | DenseGptOss) -> dict[str, Any]:
        found = judge(model, windows)
        increase = {
            f"{text}_increase_percent": round(100 * (found[text] / base[text] - 1), 3)
            for text in TEXTS
        }
        return {"experts": name, **{t: round(found[t], 4) for t in TEXTS}, **increase}

    yield row("bfloat16", original)
    for rule in RULES:
        layers = (
            replace(
                layer,
                mlp=replace(
                    layer.mlp,
                    gate_up=mx.quantize(jnp.asarray(layer.mlp.gate_up), rule),
                    down=mx.quantize(jnp.asarray(layer.mlp.down), rule),
                ),
            )
            for layer in original.params.layers
        )
        yield row(rule, GptOss(replace(original.params, layers=tuple(layers)), original.config))
    options = {
        "": GptqOptions(batch=16),
        ", damping 0.1": GptqOptions(batch=16, damping=0.1),
        ", floor scales": GptqOptions(batch=16, scale_rule="floor"),
    }
    for count in (64, 256):
        tokens = calibration_windows(ids, 256, count)
        for name, option in options.items():
            packed, _ = calibrate_and_quantize(original, tokens, option)
            yield row(f"gptq, {count} windows{name}", packed)


def judge(model: GptOss | DenseGptOss, windows: dict[str, Windows]) -> dict[str, float]:
    """Perplexity on each text."""
    return {text: likelihood(model, cut, batch=16).perplexity for text, cut in windows.items()}


def layer_rows(path: Path, calibration: Path, test: Path) -> Rows:
    """One row for each kind of linear layer in some layers of a Llama, and their mean."""
    model, tokenizer = Llama.from_gguf(path), load_llama_tokenizer(path)

    def windows(text: Path, count: int, spread: bool) -> np.ndarray:
        ids = tokenizer.encode(read_text(text).content).ids
        return calibration_windows(ids if spread else ids[: count * 512], 512, count)

    known = layer_inputs(model, windows(calibration, LAYER_WINDOWS, True))
    unknown = layer_inputs(model, windows(test, 4, False))
    rows = []
    for (index, name), inputs in known.items():
        kernel = attrgetter(name)(model.layers[index]).kernel.get_value()
        weight = np.asarray(kernel).T.copy()
        hessian = np.asarray(inputs.T @ inputs, np.float64)
        turned = np.asarray(rotate(jnp.asarray(weight)))
        rounded = {
            "floor": decode(mx.quantize(weight, "floor")),
            "mse": decode(mx.quantize(weight, "mse")),
            "gptq": decode(gptq(weight, hessian)),
            "gptq, floor scales": decode(gptq(weight, hessian, scale_rule="floor")),
            "gptq, no order": decode(gptq(weight, hessian, activation_order=False)),
            "gptq, damping 0.1": decode(gptq(weight, hessian, damping=0.1)),
            "gptq-rotated": rotate(decode(gptq(turned, rotate_both(hessian)))),
        }
        x = unknown[index, name]
        found = {
            k: round(sqnr_db(x @ weight.T, x @ np.asarray(v).T), 2) for k, v in rounded.items()
        }
        found["possible gain"] = round(possible_gain_db(hessian), 2)
        rows.append(found)
        yield {"layer": f"layers.{index}.{name}", **found}
    yield {"layer": "mean", **{k: round(float(np.mean([r[k] for r in rows])), 2) for k in rows[0]}}


def possible_gain_db(hessian: np.ndarray) -> float:
    """What compensation can gain at most where all weights of a layer are rounded as coarsely.

    Independent errors of variance s cost ``s tr(H)``. Errors that later columns make up for cost
    ``s sum(d)``, where ``H = L diag(d) L^T`` in the order of rounding (`jax_mxfp4.quantizers.gptq`
    has d as ``1 / U[k, k]^2``). The product of d is ``det(H)`` in every order, so the sum is at
    least ``K det(H)^(1/K)``: K times the geometric mean of the eigenvalues.
    """
    values = np.linalg.eigvalsh(damped(hessian, 0.01))
    return float(10 * np.log10(np.mean(values)) - 10 * np.mean(np.log10(values)))


def layer_inputs(model: Llama, tokens: np.ndarray) -> dict[tuple[int, str], np.ndarray]:
    """Inputs [tokens, K] of linear layers in the unquantized model, by layer and name."""
    found: dict[tuple[int, str], np.ndarray] = {}
    stream = model.embedding(jnp.asarray(tokens))
    for index, block in enumerate(model.layers[: max(LAYERS) + 1]):
        normed = block.attention_norm(stream)
        mixed = block.attention.mix(normed)
        stream = stream + block.attention.out(mixed)
        entered = block.mlp_norm(stream)
        active = block.mlp.activate(entered)
        stream = stream + block.mlp.down(active)
        if index in LAYERS:
            inputs = {
                **{"attention.q": normed, "attention.out": mixed},
                **{"mlp.gate": entered, "mlp.down": active},
            }
            for name, x in inputs.items():
                found[index, name] = np.asarray(x).reshape(-1, x.shape[-1])
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sqnr")
    mini = commands.add_parser("mini")
    layers = commands.add_parser("layers")
    layers.add_argument("model", type=Path)
    for command in (mini, layers):
        command.add_argument("calibration", type=Path)
    layers.add_argument("test", type=Path)
    arguments = parser.parse_args()
    head = machine()
    if arguments.command == "sqnr":
        name, rows = "quantizers-sqnr", sqnr_rows()
        head["unit"] = "SQNR in dB"
        head["protocol"] = (
            "512 x 4096 values, row scales uniform over one octave, seeds 0 to 8: median and "
            "minimum; t3 is the t distribution with 3 degrees of freedom"
        )
    elif arguments.command == "mini":
        name, rows = "gptq-mini", mini_rows(arguments.calibration)
        head["model"] = f"{(GOLDEN / 'bf16').relative_to(ROOT)}, experts only"
        head["protocol"] = (
            "perplexity, 64 windows of 256 tokens from the beginning of each text, no overlap, "
            "first token of a window unscored, float32"
        )
        head["texts"] = f"tokens of {(GOLDEN / 'ppl_golden.npz').relative_to(ROOT)}"
        head["calibration"] = f"{arguments.calibration.name}, windows of 256, evenly spread"
    else:
        name = "gptq-layer-outputs"
        rows = layer_rows(arguments.model, arguments.calibration, arguments.test)
        head["model"] = arguments.model.name
        head["unit"] = "SQNR of the outputs of one linear layer in dB, inputs of the original model"
        head["calibration"] = (
            f"{arguments.calibration.name}, {LAYER_WINDOWS} windows of 512, evenly spread"
        )
        head["test"] = f"{arguments.test.name}, first 4 windows of 512 tokens"
        head["damping"] = 0.01
    kept = []
    for row in rows:
        print(row, flush=True)
        kept.append(row)
    write_json(RESULTS / f"{name}-{head['date']}.json", head, kept)


if __name__ == "__main__":
    main()

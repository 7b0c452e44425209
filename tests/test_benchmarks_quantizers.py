"""The benchmark of quantizers, in small form."""

import json
import sys
from pathlib import Path

import pytest
import tiny_llama

import jax_mxfp4

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import quantizers  # noqa: E402

TEXT = Path(jax_mxfp4.__file__).parent / "validation" / "kidnapped.txt"


def test_outputs_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "LAYERS", (1,))
    monkeypatch.setattr(quantizers, "RESULTS", tmp_path)
    model = tiny_llama.write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(sys, "argv", ["x", "layers", str(model), str(TEXT), str(TEXT)])
    quantizers.main()
    (file,) = tmp_path.glob("gptq-layer-outputs-*.json")
    result = json.loads(file.read_text())
    *layers, mean = result["rows"]
    assert [row["layer"] for row in layers] == [
        f"layers.1.{name}" for name in ("attention.q", "attention.out", "mlp.gate", "mlp.down")
    ]
    assert result["model"] == "tiny.gguf" and "kidnapped.txt" in result["calibration"]
    assert mean["gptq"] > mean["mse"] > mean["floor"] > 10
    assert mean["gptq-rotated"] > mean["floor"]

"""The benchmark of quantizers, in small form."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_llama

import jax_mxfp4

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import quantizers  # noqa: E402

TEXT = Path(jax_mxfp4.__file__).parent / "validation" / "kidnapped.txt"


def test_outputs_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "LAYERS", (1,))
    monkeypatch.setattr(quantizers, "LAYER_WINDOWS", 32)
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
    assert all(row["possible gain"] > 0 for row in layers)


def test_only_correlated_inputs_leave_something_to_gain() -> None:
    assert abs(quantizers.possible_gain_db(3 * np.eye(8))) < 1e-9
    mixed = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    correlated = mixed * np.geomspace(1, 16, 8) @ mixed.T
    found = quantizers.possible_gain_db(correlated)
    values = np.geomspace(1, 16, 8) + 0.01 * np.geomspace(1, 16, 8).mean()  # damped
    assert found == pytest.approx(10 * np.log10(values.mean() / np.prod(values) ** (1 / 8)))
    d = np.diag(np.linalg.cholesky(quantizers.damped(correlated, 0.01))) ** 2
    assert 0 < 10 * np.log10(d.size * values.mean() / d.sum()) < found  # in any order of columns

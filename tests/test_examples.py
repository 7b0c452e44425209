"""The example programs and the README's code run as a reader would run them."""

import json
import lzma
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jax_mxfp4

ROOT = Path(__file__).parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def run(program: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(jax_mxfp4.__file__).parents[1]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process may hold most of a GPU
    }
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_layers_example(tmp_path: Path) -> None:
    output = run((ROOT / "examples" / "layers.py").read_text(), tmp_path)
    assert "2 of 2 matched modules packed" in output
    error = re.search(r"relative error (0\.\d+)", output)
    assert error is not None
    assert 0.05 < float(error[1]) < 0.25  # 4-bit weights in two layers: not exact, not noise


def test_training_example(tmp_path: Path) -> None:
    text = (ROOT / "jax_mxfp4" / "validation" / "kidnapped.txt").read_text()
    (tmp_path / "learned.txt.xz").write_bytes(lzma.compress(text[20_000:].encode()))
    (tmp_path / "held_out.txt").write_text(text[:20_000])
    program = runpy.run_path(str(ROOT / "examples" / "train_gpt_oss.py"))
    inputs = [str(tmp_path / name) for name in ("learned.txt.xz", "held_out.txt", "trained")]
    result = tmp_path / "result.json"
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
        program["main"]([*inputs, "--tiny", "--steps", "60", "--json", str(result)])
    in_training, written, mini = json.loads(result.read_text())["rows"]
    assert in_training["perplexity"] < 500  # of 1024 tokens that are equally likely at first
    tolerance = 1e-5 if jax.default_backend() == "cpu" else 1e-2  # in bfloat16
    assert abs(written["perplexity"] / in_training["perplexity"] - 1) < tolerance
    assert mini["perplexity"] < 50
    assert 0 < written["bytes"] - (tmp_path / "trained" / "model.safetensors").stat().st_size < 1e5


def test_readme_layers(tmp_path: Path) -> None:
    layers, *_ = python_blocks()
    output = run(f"{layers}\nprint(y.shape, type(packed.layers[0]).__name__)", tmp_path)
    assert output.endswith("(8, 256) MXFP4Dense\n")


def test_readme_operations(tmp_path: Path) -> None:
    _, operations, layouts = python_blocks()
    inputs = """
import jax, jax.numpy as jnp
import jax_mxfp4
draw = lambda *shape: jax.random.normal(jax.random.key(0), shape)
weights, activations, tokens = draw(48, 64), draw(5, 64), draw(5, 64)
table, ids = jax_mxfp4.quantize(draw(100, 64)), jnp.arange(7)
expert_ids, expert_weights = jnp.zeros((5, 2), jnp.int32), jnp.ones((5, 2))
gate_up, gate_up_bias = jax_mxfp4.quantize(draw(3, 64, 64)), draw(3, 64)
down, down_bias = jax_mxfp4.quantize(draw(3, 64, 32)), draw(3, 64)
"""
    shown = "print(*(a.shape for a in (x, y, e, h)))"
    same = "print((y == mx.matmul(activations, w)).all())"
    output = run("\n".join((inputs, operations, shown, layouts, same)), tmp_path)
    assert output == "(48, 64) (5, 48) (7, 64) (5, 64)\nTrue\n"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    missing = [
        link for link in links if not link.startswith("https://") and not (ROOT / link).exists()
    ]
    assert not missing

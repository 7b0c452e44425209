"""`jax-mxfp4 convert --method gptq`."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_mxfp4 import cli
from jax_mxfp4.models.gpt_oss import GptOss, load_tokenizer
from jax_mxfp4.quantizers import calibrate_and_quantize, calibration_windows
from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss

MINI = Path(__file__).parent / "golden" / "mini-gptoss" / "bf16"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("It was a bright cold day in April. " * 40)
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The first two layers of the built-in model mini, as they were before rounding."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(MINI / "tokenizer.json", folder)
    config = json.loads((MINI / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(MINI / "model.safetensors")
    kept = {name: x for name, x in stored.items() if not re.search(r"layers\.[23]", name)}
    save_file(kept, folder / "model.safetensors")
    return folder


def test_gptq(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(model), "--method", "gptq", "--calibration", str(text)]
    arguments += ["--windows", "4", "--window", "16", "--resume", str(tmp_path / "layers")]
    assert cli.run([*arguments, str(tmp_path / "packed")]) == 0
    assert "is now also" in capsys.readouterr().err

    # The same as in memory, byte by byte.
    ids = load_tokenizer(model).encode(text.read_text()).ids
    original = DenseGptOss.from_pretrained(model)
    wanted, _ = calibrate_and_quantize(original, calibration_windows(ids, 16, 4))
    found = GptOss.from_pretrained(tmp_path / "packed", jnp.float32)
    for left, right in zip(found.params.layers, wanted.params.layers, strict=True):
        for name in ("gate_up", "down"):
            packed, expected = getattr(left.mlp, name), getattr(right.mlp, name)
            np.testing.assert_array_equal(packed.blocks, expected.blocks)
            np.testing.assert_array_equal(packed.scales, expected.scales)

    # Nothing is calibrated twice.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "layers").iterdir()}
    assert len(before) == 3  # two layers and the settings
    assert cli.run([*arguments, str(tmp_path / "again.gguf")]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "layers").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["--method", "gptq"], 2, "--method gptq needs --calibration TEXT"),
        (["--calibration", "TEXT"], 2, "--calibration and --resume are for --method gptq"),
        (
            ["--method", "gptq", "--calibration", "TEXT", "--windows", "100"],
            1,
            "expected at least 100 x 512 tokens",
        ),
        (
            ["--method", "gptq", "--calibration", "TEXT", "--scale-rule", "rceil"],
            1,
            "scale_rule: expected one of",
        ),
    ],
)
def test_bad_options(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    problem: str,
) -> None:
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    assert cli.run(["convert", str(MINI), str(tmp_path / "packed"), *arguments]) == status
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "packed").exists()

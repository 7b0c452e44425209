"""inspect, verify and diff: what they find, and their commands."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner
from unpacked import write_unpacked

from jax_mxfp4 import cli_checkpoints, cli_convert
from jax_mxfp4.checkpoints import (
    CheckpointError,
    WeightsFolder,
    open_checkpoint,
)
from jax_mxfp4.checkpoints.statistics import summarize
from jax_mxfp4.convert import convert
from jax_mxfp4.format import decode, unpack_codes
from jax_mxfp4.inspection import diff, plots, verify, verifying

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
HF, OPENAI, GGUF = GOLDEN / "hf", GOLDEN / "original", GOLDEN / "tiny-mxfp4.gguf"
LLAMA = Path(__file__).parent / "golden" / "tiny-llama-mxfp4"
DOWN = "model.layers.1.mlp.experts.down_proj_"


@pytest.fixture
def edited(tmp_path):
    """Return a function that copies HF with one tensor changed."""

    def edit(name, change) -> Path:
        folder = shutil.copytree(HF, tmp_path / "edited", dirs_exist_ok=True)
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if name in tensors:
                change(tensors[name])
                save_file(tensors, file)
        return folder

    return edit


def run(*arguments):
    app = typer.Typer()
    cli_checkpoints.register(app)
    cli_convert.register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (HF, f"{DOWN}blocks"),
        (OPENAI, "block.1.mlp.mlp2_weight.blocks"),
        (GGUF, "blk.1.ffn_down_exps.weight"),
    ],
)
def test_statistics_of_packed_tensors(path, name):
    (file,) = (f for f in HF.glob("*.safetensors") if f"{DOWN}blocks" in load_file(f))
    stored = load_file(file)
    magnitudes = unpack_codes(stored[f"{DOWN}blocks"]) & 7
    scales = stored[f"{DOWN}scales"]
    shown = name.removesuffix("_blocks").removesuffix(".blocks")
    summary = {summary.name: summary for summary in summarize(open_checkpoint(path))}[shown]
    assert (summary.dtype, summary.shape) == ("MXFP4", (8, 96, 64))
    assert summary.nbytes == 8 * 96 * 2 * 17
    assert summary.packed is not None
    assert summary.packed.elements == 8 * 96 * 64
    assert summary.packed.zeros == np.count_nonzero(magnitudes == 0)
    assert summary.packed.saturated == np.count_nonzero(magnitudes == 7)
    assert summary.packed.scale_range == (scales.min(), scales.max())
    assert summary.packed.nan_scales == 0


def test_summaries_cover_every_byte():
    for path in (HF, OPENAI, GGUF):
        reader = open_checkpoint(path)
        total = sum(info.nbytes for info in reader.tensors.values())
        assert sum(summary.nbytes for summary in summarize(reader)) == total


def test_blocks_without_scales_are_a_plain_tensor(tmp_path):
    save_file({"w_blocks": np.zeros((2, 3, 16), np.uint8)}, tmp_path / "model.safetensors")
    (summary,) = summarize(open_checkpoint(tmp_path))
    assert (summary.name, summary.dtype, summary.packed) == ("w_blocks", "U8", None)


@pytest.mark.parametrize("path", [HF, OPENAI, GGUF])
def test_a_checkpoint_without_faults(path):
    found = verify(path)
    assert found.tensors == len(open_checkpoint(path).tensors)
    assert found.parameters == 848_144


def test_nan_scales_are_found(edited):
    def change(scales):
        scales[2, 5, 1] = scales[7, 0, 0] = 255

    folder = edited(f"{DOWN}scales", change)
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert caught.value.problems == (
        "'layers.1.mlp.down': 2 of 1536 scales are NaN, the first at [2, 5, 1]",
    )


def test_values_that_are_not_finite_are_found(edited):
    def change(values):
        values[3] = ml_dtypes.bfloat16("inf")

    with pytest.raises(CheckpointError, match=r"'layers\.2\.mlp\.norm': 1 of 96 values are not"):
        verify(edited("model.layers.2.post_attention_layernorm.weight", change))


def test_other_layouts_are_equal():
    for other in (OPENAI, GGUF):
        differences = list(diff(HF, other))
        assert len(differences) == 3 + 4 * 17
        assert not any(difference.different for difference in differences)


def test_a_difference_in_packed_values(edited):
    def change(scales):
        scales[1, 0, 0] += 1

    folder = edited(f"{DOWN}scales", change)
    changed = [difference for difference in diff(HF, folder) if difference.different]
    (difference,) = changed
    assert difference.name == "layers.1.mlp.down"
    assert difference.elements == 8 * 96 * 64
    assert 0 < difference.different <= 32
    assert difference.largest > 0
    assert 0 < difference.relative < 1


def test_a_difference_in_dense_values(edited):
    norm = "model.layers.0.input_layernorm.weight"
    folder = edited(norm, lambda values: values.__setitem__(0, ml_dtypes.bfloat16(64)))
    (difference,) = (one for one in diff(HF, folder) if one.different)
    before = np.concatenate(
        [load_file(f)[norm] for f in HF.glob("*.safetensors") if norm in load_file(f)]
    ).astype(np.float64)
    error = 64 - before[0]
    assert difference.largest == error
    assert difference.relative == pytest.approx(error / np.sqrt(np.sum(before**2)))
    folder = edited(norm, lambda values: values.__setitem__(0, ml_dtypes.bfloat16("nan")))
    (difference,) = (one for one in diff(HF, folder) if one.different)
    assert np.isnan(difference.largest) and difference.different == 1
    assert not any(difference.different for difference in diff(folder, folder))


def test_models_of_different_shape(tmp_path):
    from jax_mxfp4.models.gpt_oss import mini_path

    with pytest.raises(CheckpointError, match=r"'embedding': \[512, 96\] in .*hf, \[1024, 128\]"):
        list(diff(HF, mini_path()))


def test_command_inspect():
    result = run("inspect", HF)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    (row,) = (line for line in lines if line[:1] == [DOWN.rstrip("_")])
    assert row[1:8] == ["MXFP4", "8", "x", "96", "x", "64", "26,112"]
    assert result.stdout.splitlines()[-1] == "71 tensors, 829,984 bytes"


def test_command_verify(edited):
    result = run("verify", GGUF)
    assert (result.exit_code, result.stdout.split(":")[0]) == (0, "no faults")
    folder = edited(f"{DOWN}scales", lambda scales: scales.fill(255))
    assert isinstance(run("verify", folder).exception, CheckpointError)


def test_command_diff(edited, tmp_path):
    result = run("diff", HF, GGUF)
    assert (result.exit_code, result.stdout) == (0, "71 of 71 parameters are equal\n")
    folder = edited(f"{DOWN}blocks", lambda blocks: blocks.fill(0))
    result = run("diff", HF, folder)
    assert result.exit_code == 1
    assert "layers.1.mlp.down " in result.stdout
    assert result.stdout.endswith("70 of 71 parameters are equal\n")
    result = run("diff", HF, tmp_path / "absent")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "expected a checkpoint folder: no such folder" in result.stderr


def test_command_convert(tmp_path):
    assert run("convert", HF, tmp_path / "a.gguf").exit_code == 0
    assert run("convert", tmp_path / "a.gguf", tmp_path / "o", "--to", "openai").exit_code == 0
    assert (tmp_path / "o" / "model.safetensors").is_file()
    convert(tmp_path / "o", tmp_path / "back")
    assert run("diff", HF, tmp_path / "back").exit_code == 0


@pytest.fixture
def llama(tmp_path):
    """Return a function that copies the packed Llama with its configuration changed."""

    def edit(**changes) -> Path:
        folder = shutil.copytree(LLAMA / "packed", tmp_path / "llama", dirs_exist_ok=True)
        config = json.loads((LLAMA / "packed" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return edit


def test_a_packed_llama_without_faults(llama):
    for form in ("packed", "bf16"):
        found = verify(LLAMA / form)
        assert found.unchecked is None
        assert found.tensors == len(open_checkpoint(LLAMA / form).tensors)
    assert verify(LLAMA / "packed").parameters == verify(LLAMA / "bf16").parameters
    found = verify(llama(model_type="another"))
    assert found.unchecked == "shapes of a model of type 'another' against its configuration"


def test_a_llama_of_other_shapes(llama):
    config = json.loads((LLAMA / "packed" / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    with pytest.raises(CheckpointError) as caught:
        verify(llama(num_hidden_layers=layers + 1, intermediate_size=96))
    missing = [problem for problem in caught.value.problems if "missing" in problem]
    assert len(missing) == 9
    assert (
        f"tensor 'model.layers.{layers}.mlp.down_proj.weight': missing, expected [{hidden}, 96]"
        in missing
    )
    assert len(caught.value.problems) == 9 + 3 * layers
    assert any("mlp.up_proj.weight': expected [96," in problem for problem in caught.value.problems)
    with pytest.raises(
        CheckpointError, match=r"config\.json: 'hidden_size': expected a whole number"
    ):
        verify(llama(hidden_size="64"))
    with pytest.raises(CheckpointError, match="'num_hidden_layers': expected at most 10000"):
        verify(llama(num_hidden_layers=10**9))


def test_nan_scales_of_a_llama(llama):
    folder = llama()
    tensors = load_file(folder / "model.safetensors")
    scales = tensors["model.layers.1.mlp.up_proj.weight_scale"]
    scales[5, 1] = 255
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert caught.value.problems == (
        f"'model.layers.1.mlp.up_proj.weight': 1 of {scales.size} scales are NaN, "
        "the first at [5, 1]",
    )


def test_faults_are_found_in_every_chunk(edited, monkeypatch):
    def change(scales):
        scales[2, 5, 1] = scales[7, 0, 0] = 255

    monkeypatch.setattr(verifying, "_CHUNK", 50)
    with pytest.raises(
        CheckpointError, match=r"2 of 1536 scales are NaN, the first at \[2, 5, 1\]"
    ):
        verify(edited(f"{DOWN}scales", change))


def test_the_error_of_packing_a_llama():
    plain, packed = WeightsFolder(LLAMA / "bf16"), WeightsFolder(LLAMA / "packed")
    differences = {one.name: one for one in diff(LLAMA / "bf16", LLAMA / "packed")}
    assert list(differences) == list(plain.specs)
    for name, one in differences.items():
        values = plain.read(name).astype(np.float64)
        assert one.elements == values.size
        if not packed.specs[name].packed:
            assert one.different == 0
            continue
        weight = packed.read(name)
        error = np.asarray(decode(weight.blocks, weight.scales, np.float32)) - values
        assert one.different == np.count_nonzero(error)
        assert one.largest == np.abs(error).max()
        assert one.relative == pytest.approx(np.linalg.norm(error) / np.linalg.norm(values))
    assert not any(one.different for one in diff(LLAMA / "packed", LLAMA / "packed"))


@pytest.mark.parametrize("layout", ["huggingface", "openai", "gguf"])
def test_experts_that_are_not_packed(tmp_path, layout):
    source = write_unpacked(tmp_path / ("a.gguf" if layout == "gguf" else layout), layout)
    assert verify(source).parameters == verify(HF).parameters
    assert not any(one.different for one in diff(source, HF))
    assert not any(one.different for one in diff(OPENAI, source))


@pytest.mark.parametrize(
    ("layout", "name", "index"),
    [
        ("huggingface", "model.layers.2.mlp.experts.down_proj", (3, 7, 5)),
        ("openai", "block.2.mlp.mlp2_weight", (3, 5, 7)),
    ],
)
def test_the_error_of_packing_experts(tmp_path, layout, name, index):
    source = write_unpacked(tmp_path / layout, layout)
    tensors = load_file(source / "model.safetensors")
    error = abs(64 - float(tensors[name][index]))
    tensors[name][index] = 64
    save_file(tensors, source / "model.safetensors")
    (one,) = (one for one in diff(source, HF) if one.different)
    assert (one.name, one.different, one.largest) == ("layers.2.mlp.down", 1, error)
    values = tensors[name].astype(np.float64)
    assert one.relative == pytest.approx(error / np.linalg.norm(values))


def test_inspect_shows_weights_of_compressed_tensors():
    result = run("inspect", LLAMA / "packed")
    assert result.exit_code == 0
    (row,) = (line.split() for line in result.stdout.splitlines() if "1.mlp.up_proj.weight" in line)
    assert row[1] == "MXFP4"


def test_counts_are_of_scale_and_code():
    name = f"{DOWN}blocks".removesuffix("_blocks")
    (packed,) = (one.packed for one in summarize(open_checkpoint(HF)) if one.name == name)
    reader = open_checkpoint(HF)
    codes = unpack_codes(reader.read(f"{DOWN}blocks")).reshape(-1, 32)
    scales = reader.read(f"{DOWN}scales").reshape(-1)
    expected = np.zeros((256, 16), np.int64)
    np.add.at(expected, (scales[:, None], codes), 1)
    np.testing.assert_array_equal(packed.counts, expected)


def test_a_picture(tmp_path):
    result = run("inspect", HF, "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_cumulative_shares():
    counts = np.zeros((256, 16), np.int64)
    counts[127, [0, 2, 8]] = 10, 20, 5  # 0, 1 and -0
    counts[128, 9] = 15  # -0.5 * 2
    counts[255, 3] = 7  # NaN
    values, shares = plots.cumulative_shares(counts)
    np.testing.assert_array_equal(values, [-1, 0, 1])
    np.testing.assert_allclose(shares, [0.3, 0.6, 1])


def test_pictures_that_cannot_be(tmp_path, monkeypatch):
    for name, message in (
        ("a.doc", "expected the name of a picture"),
        ("absent/a.png", "absent: expected a folder to write to: no such folder"),
    ):
        result = run("inspect", HF, "--plot", tmp_path / name)
        assert isinstance(result.exception, ValueError) and message in str(result.exception)
        assert result.stdout == ""
    result = run("inspect", LLAMA / "bf16", "--plot", tmp_path / "a.png")
    assert str(result.exception) == "no tensor is packed: there is nothing to plot"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", HF, "--plot", tmp_path / "a.png")
    assert isinstance(result.exception, RuntimeError)
    assert str(result.exception).endswith("pip install 'jax-mxfp4[plot]'")
    assert list(tmp_path.iterdir()) == []


def test_command_verify_prints_checksums(tmp_path):
    digest = hashlib.sha256(GGUF.read_bytes()).hexdigest()
    lines = run("verify", GGUF).stdout.splitlines()
    assert lines[1:] == ["no checksum is recorded of:", f"{digest}  {GGUF.name}"]
    convert(HF, tmp_path / "hf")
    count = len((tmp_path / "hf" / "SHA256SUMS").read_text().splitlines())
    lines = run("verify", tmp_path / "hf").stdout.splitlines()
    assert lines[1:] == [f"checksums: {count} files are as recorded in SHA256SUMS"]

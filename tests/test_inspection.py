"""inspect, verify and diff: what they find, and their commands."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jax_mxfp4 import cli_checkpoints
from jax_mxfp4.checkpoints import CheckpointError, open_checkpoint
from jax_mxfp4.checkpoints.statistics import summarize
from jax_mxfp4.convert import convert
from jax_mxfp4.format import unpack_codes
from jax_mxfp4.inspection import diff, verify

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
HF, OPENAI, GGUF = GOLDEN / "hf", GOLDEN / "original", GOLDEN / "tiny-mxfp4.gguf"
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

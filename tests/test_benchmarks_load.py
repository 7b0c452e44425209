"""The benchmark of loading, with a small checkpoint: what it reports, and what it leaves behind."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import load  # noqa: E402
import run  # noqa: E402
from results import Refused  # noqa: E402

from jax_mxfp4.checkpoints import open_checkpoint  # noqa: E402
from jax_mxfp4.inspection import verify  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    """The benchmark with a model of a few megabytes instead of gpt-oss-20b."""
    config = replace(
        load.GPT_OSS_20B,
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        eos_token_ids=(7,),
    )
    monkeypatch.setattr(load, "GPT_OSS_20B", config)


def test_the_checkpoint_has_the_size_of_the_released_one():
    config = load.GPT_OSS_20B
    specs = load.parameter_specs(config)
    sizes = [
        17 * np.prod(spec.part_shape, dtype=np.int64)
        if spec.packed
        else 2 * np.prod(spec.shape, dtype=np.int64)
        for spec in specs.values()
    ]
    assert sum(sizes) == 13_761_264_768


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", ["huggingface", "gguf"])
def test_what_is_written_is_a_checkpoint_without_faults(tmp_path, layout):
    path = load._write(load._with_layers(3), layout, tmp_path, lambda text: None)
    assert verify(path).tensors == len(open_checkpoint(path).tensors)
    assert [one.name for one in tmp_path.iterdir() if one.suffix != ".sha256"] == [path.name]


@pytest.mark.usefixtures("small")
def test_the_command(tmp_path, capsys):
    arguments = ["--layers", "2", "--samples", "1", "--allow-dirty", "--commit", "abc"]
    folders = ["--folder", str(tmp_path / "scratch"), "--out", str(tmp_path / "out")]
    (tmp_path / "scratch").mkdir()
    git = BENCHMARKS.parent / ".git"
    assert run.main(["load", *(arguments[:-2] if git.exists() else arguments), *folders]) == 0
    assert list((tmp_path / "scratch").iterdir()) == []
    (file,) = (tmp_path / "out").iterdir()
    assert file.name.endswith("-load.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["layout"] == "huggingface"
    assert row["fraction"] == pytest.approx(row["load_gbs"] / row["read_gbs"], rel=0.5, abs=0.01)
    assert row["host_array_bytes"] < row["file_bytes"]
    assert row["beyond_arrays_bytes"] == row["peak_rss_bytes"] - row["host_array_bytes"]
    assert row["peak_rss_bytes"] >= row["rss_before_bytes"] > 10**7
    assert row["bound_bytes"] == 2**30 + row["largest_tensor_bytes"]
    assert run.main(["report", str(file)]) == 0
    assert "huggingface" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_nothing_is_left_after_a_failure(tmp_path, monkeypatch):
    def fail(path):
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "load", fail)
    with pytest.raises(KeyboardInterrupt):
        load.measure_load("huggingface", 1, tmp_path, 1, lambda text: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_too_little_room(tmp_path, monkeypatch):
    usage = load.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(load.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(Refused, match=r"free bytes, found 1,000"):
        load.measure_load("huggingface", 1, tmp_path, 1, lambda text: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_too_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_proc_bytes", lambda file, field: 1000)
    with pytest.raises(Refused, match=r"bytes of memory, found 1,000"):
        load.measure_load("huggingface", 1, tmp_path, 1, lambda text: None)
    assert list(tmp_path.iterdir()) == []

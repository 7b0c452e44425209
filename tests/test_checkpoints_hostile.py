"""Checkpoints that are damaged, incomplete or made to do harm: one clear error each."""

import json
import os
import pickle
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_mxfp4.checkpoints import CheckpointError, SafetensorsFolder
from jax_mxfp4.checkpoints.checksums import check_files
from jax_mxfp4.models.gpt_oss import GptOss, load_params, read_config

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
SHARDS = [f"model-0000{i}-of-00001.safetensors" for i in (0, 1)]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hf(tmp_path) -> Path:
    return shutil.copytree(GOLDEN / "hf", tmp_path / "hf")


@pytest.fixture
def original(tmp_path) -> Path:
    return shutil.copytree(GOLDEN / "original", tmp_path / "original")


def edit(file: Path, change) -> None:
    """Rewrites a safetensors file with `change` applied to its dictionary of tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def load(folder: Path):
    return load_params(folder, read_config(folder), np.float32)


def test_every_mismatch_is_reported_at_once(original):
    def spoil(tensors):
        del tensors["block.1.attn.sinks"]
        del tensors["block.3.mlp.mlp2_weight.scales"]
        tensors["block.0.attn.qkv.weight"] = np.zeros((255, 96), ml_dtypes.bfloat16)
        tensors["block.2.mlp.mlp1_weight.blocks"] = np.zeros((8, 128, 3, 16), np.int8)
        tensors["norm.scale"] = np.zeros(96, np.int64)
        tensors["block.4.attn.norm.scale"] = np.zeros(96, ml_dtypes.bfloat16)

    edit(original / "model.safetensors", spoil)
    with pytest.raises(CheckpointError) as caught:
        load(original)
    file = "model.safetensors: tensor "
    assert caught.value.problems == (
        f"{file}'block.0.attn.qkv.weight': expected BF16 or F16 or F32 [256, 96], "
        "found BF16 [255, 96]",
        "tensor 'block.1.attn.sinks': missing, expected BF16 or F16 or F32 [4]",
        f"{file}'block.2.mlp.mlp1_weight.blocks': expected U8 [8, 128, 3, 16], "
        "found I8 [8, 128, 3, 16]",
        "tensor 'block.3.mlp.mlp2_weight.scales': missing, expected U8 [8, 96, 2]",
        f"{file}'norm.scale': expected BF16 or F16 or F32 [96], found I64 [96]",
        f"{file}'block.4.attn.norm.scale': unexpected, found BF16 [96]",
    )
    message = str(caught.value)
    assert message.startswith(f"{original}: 6 problems\n")
    assert all(problem in message for problem in caught.value.problems)


def test_mismatches_in_several_files_are_reported_at_once(hf):
    (hf / INDEX).unlink()
    prefix = "model.layers.0.mlp.experts.down_proj"
    changed = {
        f"{prefix}_blocks": np.zeros((8, 96, 2, 15), np.uint8),
        f"{prefix}_scales": np.zeros((8, 96, 2), np.int8),
        "model.layers.3.self_attn.sinks": None,
        "model.norm.weight": np.zeros(96, np.float64),
    }
    files = {name: file for file in map(hf.joinpath, SHARDS) for name in load_file(file)}
    assert len({files[name] for name in changed}) == 2
    for name, value in changed.items():
        edit(files[name], lambda tensors, name=name: tensors.pop(name))
        if value is not None:
            edit(files[name], lambda tensors, new={name: value}: tensors.update(new))
    edit(hf / SHARDS[0], lambda tensors: tensors.update(stray=np.zeros(3, np.float32)))
    with pytest.raises(CheckpointError) as caught:
        load(hf)
    assert sorted(caught.value.problems) == sorted(
        (
            f"{files[f'{prefix}_blocks'].name}: tensor '{prefix}_blocks': "
            "expected U8 [8, 96, 2, 16], found U8 [8, 96, 2, 15]",
            f"{files[f'{prefix}_scales'].name}: tensor '{prefix}_scales': "
            "expected U8 [8, 96, 2], found I8 [8, 96, 2]",
            "tensor 'model.layers.3.self_attn.sinks': missing, expected BF16 or F16 or F32 [4]",
            f"{files['model.norm.weight'].name}: tensor 'model.norm.weight': "
            "expected BF16 or F16 or F32 [96], found F64 [96]",
            f"{SHARDS[0]}: tensor 'stray': unexpected, found F32 [3]",
        )
    )


def test_unpacked_experts_are_named(original):
    def unpack(tensors):
        del tensors["block.0.mlp.mlp1_weight.blocks"], tensors["block.0.mlp.mlp1_weight.scales"]
        tensors["block.0.mlp.mlp1_weight"] = np.zeros((8, 128, 96), ml_dtypes.bfloat16)

    edit(original / "model.safetensors", unpack)
    with pytest.raises(CheckpointError) as caught:
        load(original)
    assert len(caught.value.problems) == 3
    assert "'block.0.mlp.mlp1_weight': unexpected" in str(caught.value)


def test_from_pretrained_raises_a_value_error(original):
    edit(original / "model.safetensors", lambda tensors: tensors.pop("embedding.weight"))
    with pytest.raises(ValueError, match=r"tensor 'embedding\.weight': missing"):
        GptOss.from_pretrained(original)


def test_all_bad_files_are_reported(hf):
    (hf / SHARDS[0]).unlink()
    (hf / SHARDS[1]).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(hf)
    assert caught.value.where == str(hf / INDEX)
    missing, damaged = caught.value.problems
    assert missing == f"{SHARDS[0]}: missing file"
    assert damaged.startswith(f"{SHARDS[1]}: truncated or damaged")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "..",
        "",
        "config.json",
        "a\0b.safetensors",
        "é" * 200 + ".safetensors",
        None,
        7,
    ],
)
def test_index_may_only_name_files_of_its_folder(hf, name):
    edit_json(hf / INDEX, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight': expected the name of a") as e:
        SafetensorsFolder(hf)
    assert e.value.where == str(hf / INDEX)


def test_index_and_headers_must_agree(hf):
    """Missing, unexpected and misplaced tensors, and those that are there twice, all at once."""
    twice = "model.layers.0.self_attn.sinks"
    other = next(file for file in map(hf.joinpath, SHARDS) if twice not in load_file(file))
    edit(other, lambda tensors: tensors.update({twice: np.zeros(4, ml_dtypes.bfloat16)}))

    def spoil(index):
        weight_map = index["weight_map"]
        weight_map["lm_head.weight"] = SHARDS[1]
        weight_map["ghost"] = SHARDS[0]
        del weight_map["model.norm.weight"]

    edit_json(hf / INDEX, spoil)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(hf)
    assert set(caught.value.problems) == {
        f"tensor 'lm_head.weight': the index says {SHARDS[1]}, found in {SHARDS[0]}",
        f"tensor 'ghost': the index says {SHARDS[0]}, found in none of the files",
        f"tensor 'model.norm.weight' of {SHARDS[1]}: not in the index",
        f"{SHARDS[1]}: tensor '{twice}' is also in {SHARDS[0]}",
    }


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": []}', "{}", "[" * 100_000])
def test_unusable_index(hf, content):
    (hf / INDEX).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(hf)
    assert caught.value.where == str(hf / INDEX)


def test_two_indices(hf):
    shutil.copy(hf / INDEX, hf / "other.safetensors.index.json")
    with pytest.raises(CheckpointError, match="expected one index file"):
        SafetensorsFolder(hf)


def test_the_same_tensor_in_two_files(original):
    shutil.copy(original / "model.safetensors", original / "model2.safetensors")
    with pytest.raises(CheckpointError, match=r"'norm\.scale' is also in model\.safetensors"):
        SafetensorsFolder(original)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        SafetensorsFolder(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="found a file"):
        SafetensorsFolder(tmp_path / "file")
    with pytest.raises(CheckpointError, match="expected \\*\\.safetensors files, found none"):
        SafetensorsFolder(tmp_path)


def test_a_folder_named_like_a_shard(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["absent", "model.safetensors"])
def test_from_pretrained_needs_a_folder(tmp_path, name):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=f"{name}: expected a checkpoint folder: "):
        GptOss.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("names", [["weird"], ["model.a", "block.0.a"]])
def test_unknown_layout(original, names):
    save_file({name: np.zeros(1, np.uint8) for name in names}, original / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected the tensor names of a GPT-OSS checkpoint"):
        load(original)


def test_names_of_files_cannot_speak_to_the_terminal(tmp_path):
    name = os.fsdecode(b"a\x1b[2J\n\xff.safetensors")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(tmp_path)
    assert r"a\x1b[2J\n\udcff.safetensors: truncated or damaged" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("last", ["99999", "9" * 200])
def test_a_series_of_absurd_length(original, last):
    (original / "model.safetensors").rename(original / f"model-00001-of-{last}.safetensors")
    with pytest.raises(CheckpointError, match="further files of this series are missing") as caught:
        SafetensorsFolder(original)
    assert len(caught.value.problems) == 17


@pytest.mark.parametrize("name", ["a" * 256, "a/" * 3000 + "a", "../a", "/etc/passwd"])
def test_checksums_of_what_is_no_file_of_the_folder(original, name):
    (original / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: line 1: .* in this folder, found '0"):
        list(check_files(original, ()))


def test_errors_survive_pickling():
    error = CheckpointError("here", ["one", "two"])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.where, again.problems) == (str(error), "here", ("one", "two"))

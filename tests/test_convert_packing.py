"""Packing the linear layers of models other than GPT-OSS."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_mxfp4 import cli, quantize
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import CheckpointError, WeightsFolder
from jax_mxfp4.convert import convert, modules, packing, round_to_nearest

GOLDEN = Path(__file__).parent / "golden" / "tiny-llama-mxfp4"
SOURCE = GOLDEN / "bf16"


@pytest.fixture
def source(tmp_path):
    return shutil.copytree(SOURCE, tmp_path / "source")


def quantization_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def packed_modules(folder):
    specs = WeightsFolder(folder).specs
    return {name.removesuffix(".weight") for name, spec in specs.items() if spec.packed}


def add_tensors(folder, tensors):
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file)


def assert_same_files(left, right):
    one, other = load_file(left), load_file(right)
    assert set(one) == set(other)
    for name, tensor in one.items():
        np.testing.assert_array_equal(other[name], tensor, strict=True)


def test_the_result_is_that_of_compressed_tensors(tmp_path):
    convert(SOURCE, tmp_path / "packed")
    assert_same_files(
        GOLDEN / "packed" / "model.safetensors", tmp_path / "packed/model.safetensors"
    )
    written, golden = (
        quantization_of(folder) for folder in (tmp_path / "packed", GOLDEN / "packed")
    )
    # An embedding is no linear layer, so that it makes no difference to be ignored as one.
    assert written.pop("ignore") == ["lm_head", "model.embed_tokens"]
    assert golden.pop("ignore") == ["lm_head"]
    assert written == {key: golden[key] for key in written}
    assert not any(value for key, value in golden.items() if key not in {*written, "version"})
    config = json.loads((SOURCE / "config.json").read_text())
    found = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert found == {**config, "quantization_config": found["quantization_config"]}


@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "mse"])
@pytest.mark.parametrize("chunk", [packing._CHUNK, 100])
def test_scale_rules(tmp_path, monkeypatch, rule, chunk):
    monkeypatch.setattr(packing, "_CHUNK", chunk)
    convert(SOURCE, tmp_path / "packed", pattern=r".*0\.mlp\.up_proj", pack=round_to_nearest(rule))
    name = "model.layers.0.mlp.up_proj.weight"
    expected = quantize(jnp.asarray(load_file(SOURCE / "model.safetensors")[name]), rule)
    found = WeightsFolder(tmp_path / "packed").read(name)
    np.testing.assert_array_equal(found.blocks, expected.blocks)
    np.testing.assert_array_equal(found.scales, expected.scales)


def test_an_unknown_scale_rule():
    with pytest.raises(ValueError, match=r"scale_rule must be one of .*, got 'best'"):
        round_to_nearest("best")


def test_the_pattern_says_what_is_packed_and_the_rest_is_ignored(tmp_path):
    convert(SOURCE, tmp_path / "packed", pattern=r"model\.layers\.1\.mlp\..*|lm_head")
    layers = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert packed_modules(tmp_path / "packed") == {*layers, "lm_head"}
    found = quantization_of(tmp_path / "packed")
    every = packed_modules(GOLDEN / "packed") | {"lm_head", "model.embed_tokens"}
    assert set(found["ignore"]) == every - packed_modules(tmp_path / "packed")
    assert len(found["ignore"]) == len(set(found["ignore"]))
    assert found["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]


def test_a_head_that_shares_the_embedding_is_ignored(tmp_path, source):
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "packed")
    assert quantization_of(tmp_path / "packed")["ignore"] == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize("chunk", [modules._CHUNK_BYTES, 50])
def test_all_else_is_copied(tmp_path, monkeypatch, source, chunk):
    monkeypatch.setattr(modules, "_CHUNK_BYTES", chunk)
    extra = {
        "model.layers.0.self_attn.q_proj.bias": np.arange(64).astype(ml_dtypes.bfloat16),
        "steps": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float16),
        "mask": np.arange(300).reshape(3, 100) % 3 == 0,
        "double": np.linspace(0, 1, 33).reshape(33, 1),
    }
    add_tensors(source, extra)
    copied = {"tokenizer.json": "{}", "tokenizer.model": "model", "LICENSE": "Apache-2.0"}
    left = {".hidden.json": "{}", "pytorch_model.bin": "", "old.safetensors.index.json.bak": ""}
    for name, content in (copied | left).items():
        (source / name).write_text(content)
    convert(source, tmp_path / "packed", max_shard_bytes=40_000)
    weights = WeightsFolder(tmp_path / "packed")
    for name, value in load_file(source / "model.safetensors").items():
        if not weights.specs[name].packed:
            found = weights.read(name)
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert found.tobytes() == value.tobytes()
    for name, content in copied.items():
        assert (tmp_path / "packed" / name).read_text() == content
    shards = {path.name for path in (tmp_path / "packed").glob("*.safetensors")}
    assert len(shards) > 1
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {
        *copied,
        *shards,
        "SHA256SUMS",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }


def test_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(
        CheckpointError, match=r'"layers\\.0" matches the name of no module .* are .lm_head'
    ):
        convert(SOURCE, tmp_path / "packed", pattern=r"layers\.0")
    assert list(tmp_path.iterdir()) == []


def test_everything_that_cannot_be_packed_is_listed(tmp_path, source):
    add_tensors(
        source,
        {
            "a.weight": np.zeros((4, 48), np.float32),
            "b.weight": np.zeros((32, 32), np.int8),
            "c.weight": np.zeros((2, 32, 32), np.float16),
            "d.weight": np.zeros((4, 0), np.float32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "packed", pattern=r"[a-d]|model\.norm|lm_head")
    found = {problem.split("'")[1]: problem.split("found ")[1] for problem in caught.value.problems}
    assert found == {
        "a.weight": "F32 [4, 48]",
        "b.weight": "I8 [32, 32]",
        "c.weight": "F16 [2, 32, 32]",
        "d.weight": "F32 [4, 0]",
        "model.norm.weight": "BF16 [64]",
    }
    assert "[N, K] with K a multiple of 32" in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


def test_a_pattern_that_is_no_regular_expression(tmp_path):
    with pytest.raises(ValueError, match=r'"\(" is not a regular expression: missing \)'):
        convert(SOURCE, tmp_path / "packed", pattern="(")


def test_weights_that_are_packed_already(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: 'quantization_config': .* already"):
        convert(GOLDEN / "packed", tmp_path / "packed")


@pytest.mark.parametrize(("name", "layout"), [("a", "openai"), ("a.gguf", None)])
def test_layouts_of_gpt_oss_only(tmp_path, name, layout):
    with pytest.raises(CheckpointError, match="'huggingface' for a model of type 'llama', found"):
        convert(SOURCE, tmp_path / name, layout)
    assert list(tmp_path.iterdir()) == []


def test_another_way_of_packing(tmp_path):
    calls = {}

    def pack(name, matrix):
        calls[name] = matrix
        groups = matrix.shape[1] // 32
        blocks = jnp.full((matrix.shape[0], groups, 16), 0x2A, jnp.uint8)
        return MXFP4Array(blocks, jnp.full(blocks.shape[:-1], 99, jnp.uint8))

    convert(SOURCE, tmp_path / "packed", pack=pack)
    weights = WeightsFolder(tmp_path / "packed")
    assert set(calls) == packed_modules(GOLDEN / "packed") == packed_modules(tmp_path / "packed")
    for name, value in load_file(SOURCE / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module in calls:
            np.testing.assert_array_equal(calls[module], value, strict=True)
            found = weights.read(name)
            assert found.shape == value.shape
            assert set(found.blocks.flat) == {0x2A} and set(found.scales.flat) == {99}


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    def interrupt(name, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(SOURCE, tmp_path / "packed", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    convert(SOURCE, tmp_path / "packed")
    assert packed_modules(tmp_path / "packed") == packed_modules(GOLDEN / "packed")


def test_the_command(tmp_path, capsys):
    arguments = ["convert", str(SOURCE), str(tmp_path / "packed")]
    assert cli.run([*arguments, "--scale-rule", "rceil", "--pack", r".*\.o_proj"]) == 0
    assert "packed" in capsys.readouterr().err
    name = "model.layers.0.self_attn.o_proj.weight"
    assert packed_modules(tmp_path / "packed") == {
        f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)
    }
    expected = quantize(jnp.asarray(load_file(SOURCE / "model.safetensors")[name]), "rceil")
    np.testing.assert_array_equal(
        WeightsFolder(tmp_path / "packed").read(name).blocks, expected.blocks
    )
    arguments[-1] = str(tmp_path / "other")
    assert cli.run([*arguments, "--pack", "norm"]) == 1
    assert "matches the name of no module" in capsys.readouterr().err
    assert cli.run([*arguments, "--scale-rule", "best"]) == 2
    assert not (tmp_path / "other").exists()

"""Conversions between the layouts: nothing may change, and nothing half-made may be left."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import (
    CheckpointError,
    SafetensorsFolder,
    open_checkpoint,
    read_parameters,
)
from jax_mxfp4.convert import convert
from jax_mxfp4.convert import gpt_oss as convert_gpt_oss
from jax_mxfp4.models.gpt_oss import (
    GptOssConfig,
    YarnScaling,
    load_tokenizer,
    mini_path,
    read_config,
)
from jax_mxfp4.models.gpt_oss.config_writing import hugging_face_json, openai_json
from jax_mxfp4.models.gpt_oss.params import parameter_specs

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
HF, OPENAI, GGUF = GOLDEN / "hf", GOLDEN / "original", GOLDEN / "tiny-mxfp4.gguf"


def assert_same_tensors(left: Path, right: Path) -> None:
    one, other = open_checkpoint(left), open_checkpoint(right)
    assert set(one.tensors) == set(other.tensors)
    for name, info in one.tensors.items():
        assert other.tensors[name].dtype == info.dtype
        assert other.tensors[name].shape == info.shape
        assert other.read(name).tobytes() == one.read(name).tobytes()


def test_hugging_face_to_gguf_and_back(tmp_path):
    convert(HF, tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "back")
    assert_same_tensors(HF, tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (HF / name).read_bytes()
    assert read_config(tmp_path / "a.gguf") == read_config(HF)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "a.gguf.sha256", "back"]


def test_hugging_face_to_openai_and_back(tmp_path):
    convert(HF, tmp_path / "original", "openai")
    assert_same_tensors(OPENAI, tmp_path / "original")
    assert read_config(tmp_path / "original") == read_config(OPENAI)
    assert json.loads((tmp_path / "original" / "config.json").read_text()) == json.loads(
        (OPENAI / "config.json").read_text()
    )
    convert(tmp_path / "original", tmp_path / "back")
    assert_same_tensors(HF, tmp_path / "back")
    assert read_config(tmp_path / "back") == dataclasses.replace(read_config(HF), eos_token_ids=())


def test_the_written_gguf_file_holds_what_the_golden_one_holds(tmp_path):
    convert(HF, tmp_path / "a.gguf")
    written, golden = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        for file in (tmp_path / "a.gguf", GGUF)
    )
    assert set(written) == set(golden)
    for name, tensor in golden.items():
        assert written[name].shape.tolist() == tensor.shape.tolist()
        values = [gguf.dequantize(one.data, one.tensor_type) for one in (written[name], tensor)]
        np.testing.assert_array_equal(*values)
        if tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4:
            assert written[name].tensor_type == tensor.tensor_type
            assert written[name].data.tobytes() == tensor.data.tobytes()
    # Kernels of llama.cpp that take nothing else.
    for name in ("attn_norm.weight", "attn_sinks.weight", "ffn_gate_inp.weight", "attn_q.bias"):
        assert written[f"blk.0.{name}"].tensor_type == gguf.GGMLQuantizationType.F32
    assert written["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    metadata = gguf.GGUFReader(tmp_path / "a.gguf").fields
    for key, field in gguf.GGUFReader(GGUF).fields.items():
        if key not in ("GGUF.kv_count", "general.name"):
            assert metadata[key].contents() == field.contents(), key


def test_a_foreign_gguf_file(tmp_path):
    convert(GGUF, tmp_path / "hf")
    specs = parameter_specs(read_config(GGUF))
    assert read_config(tmp_path / "hf") == read_config(GGUF)
    expected = dict(read_parameters(SafetensorsFolder(HF), specs))
    for name, value in read_parameters(SafetensorsFolder(tmp_path / "hf"), specs):
        if isinstance(value, MXFP4Array):
            np.testing.assert_array_equal(value.blocks, expected[name].blocks)
        else:
            np.testing.assert_array_equal(value, expected[name].astype(np.float32), strict=True)


def test_the_built_in_model_takes_its_tokenizer_along(tmp_path):
    convert(mini_path(), tmp_path / "mini.gguf")
    assert load_tokenizer(tmp_path / "mini.gguf").to_str() == load_tokenizer(mini_path()).to_str()
    convert(tmp_path / "mini.gguf", tmp_path / "original", "openai")
    convert(tmp_path / "original", tmp_path / "hf")
    assert_same_tensors(mini_path(), tmp_path / "hf")
    tokenizer = (mini_path() / "tokenizer.json").read_bytes()
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == tokenizer


def test_every_bit_pattern_survives(tmp_path):
    source = shutil.copytree(HF, tmp_path / "source")
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            random = np.random.default_rng(len(name)).integers(0, 256, tensor.nbytes, np.uint8)
            tensors[name] = random.view(tensor.dtype).reshape(tensor.shape)
        save_file(tensors, file)
    convert(source, tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "original", "openai")
    convert(tmp_path / "original", tmp_path / "b.gguf")
    convert(tmp_path / "b.gguf", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")


def test_shards(tmp_path):
    convert(HF, tmp_path / "hf", max_shard_bytes=200_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) >= 4
    assert_same_tensors(HF, tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    total = sum(info.nbytes for info in SafetensorsFolder(HF).tensors.values())
    assert index["metadata"]["total_size"] == total


def test_element_types_that_cannot_share_a_tensor(tmp_path):
    source = shutil.copytree(HF, tmp_path / "source")
    (file,) = (f for f in source.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    tensors = load_file(file)
    name = "model.layers.3.self_attn.q_proj.bias"
    tensors[name] = tensors[name].astype(np.float32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"'block\.3\.attn\.qkv\.bias': expected one element"):
        convert(source, tmp_path / "original", "openai")
    convert(source, tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "back")
    assert_same_tensors(source, tmp_path / "back")
    assert not (tmp_path / "original").exists()


@pytest.mark.parametrize("name", ["a.gguf", "folder"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, name):
    def interrupt(name, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(HF, tmp_path / name, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    convert(HF, tmp_path / name)
    assert read_config(tmp_path / name) == read_config(HF)


@pytest.mark.parametrize("name", ["a.gguf", "folder"])
def test_nothing_is_overwritten(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(HF, tmp_path / name)
    assert list(tmp_path.rglob("*")) == [tmp_path / name]


def test_destinations_that_cannot_be(tmp_path):
    with pytest.raises(CheckpointError, match="absent: expected a folder to write to"):
        convert(HF, tmp_path / "absent" / "hf")
    with pytest.raises(CheckpointError, match="expected a name that fits the layout 'openai'"):
        convert(HF, tmp_path / "a.gguf", "openai")
    with pytest.raises(CheckpointError, match="expected a name that fits the layout 'gguf'"):
        convert(HF, tmp_path / "a", "gguf")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda file: file.symlink_to("absent"), "cannot be read: No such file"),
        (lambda file: file.symlink_to("/dev/zero"), "expected a file, found a pipe or a device"),
        # A hole: it takes no room on the disk.
        (lambda file: (file.touch(), os.truncate(file, 2**34)), "at most 67108864 bytes, found"),
    ],
    ids=["dangling", "device", "gigabytes"],
)
def test_files_beside_the_weights_that_cannot_be(tmp_path, name, make, problem):
    source = shutil.copytree(HF, tmp_path / "source")
    make(source / name)
    with pytest.raises(CheckpointError, match=problem) as caught:
        convert(source, tmp_path / "a.gguf")
    assert caught.value.where == str(source / name)
    assert list(tmp_path.iterdir()) == [source]


def test_metadata_that_was_edited_after_the_conversion(tmp_path, monkeypatch):
    changed = convert_gpt_oss.gguf_metadata

    def edited(config):
        return changed(config) | {"gpt-oss.rope.freq_base": 10000.0, "gpt-oss.expert_used_count": 2}

    monkeypatch.setattr(convert_gpt_oss, "gguf_metadata", edited)
    convert(HF, tmp_path / "a.gguf")
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path / "a.gguf")
    assert caught.value.problems == (
        "experts_per_token: 2, but 4 in 'jax_mxfp4.config.json'",
        "rope_theta: 10000.0, but 150000.0 in 'jax_mxfp4.config.json'",
    )


UNUSUAL = {
    "pattern": {"layer_types": ("full_attention", "sliding_attention") * 2},
    "truncate": {"rope_scaling": YarnScaling(truncate=True)},
    "plain": {"rope_scaling": None},
    "factor": {"rope_scaling": YarnScaling(attention_factor=1.25)},
    "alpha": {"swiglu_alpha": 1.5, "swiglu_limit": 5.0},
    "eps": {"rms_norm_eps": 1e-6},
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_configurations(tmp_path, case):
    config = dataclasses.replace(read_config(HF), **UNUSUAL[case])
    source = shutil.copytree(HF, tmp_path / "source")
    (source / "generation_config.json").unlink()
    (source / "config.json").write_text(json.dumps(hugging_face_json(config)))
    assert read_config(source) == config
    convert(source, tmp_path / "a.gguf")
    assert read_config(tmp_path / "a.gguf") == config
    if case == "plain":
        convert(source, tmp_path / "original", "openai")
        assert read_config(tmp_path / "original") == dataclasses.replace(config, eos_token_ids=())
    else:
        with pytest.raises(CheckpointError, match="the layout 'openai' cannot express"):
            convert(source, tmp_path / "original", "openai")
        assert not (tmp_path / "original").exists()


def test_openai_json_is_exact_for_the_released_configurations():
    config = GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=32,
        experts_per_token=4,
        layer_types=("sliding_attention", "full_attention") * 12,
        sliding_window=128,
        eos_token_ids=(200002, 199999, 200012),
    )
    written = openai_json(config)
    assert (written["initial_context_length"], written["rope_scaling_factor"]) == (4096, 32)
    assert (written["rope_ntk_alpha"], written["rope_ntk_beta"]) == (1, 32)


def test_narrowing_that_would_lose_values(tmp_path):
    convert(HF, tmp_path / "a.gguf")
    place = {t.name: t for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    start = place["blk.0.attn_sinks.weight"].data_offset
    content = bytearray((tmp_path / "a.gguf").read_bytes())
    content[start : start + 4] = np.float32(0.1).tobytes()
    (tmp_path / "b.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'layers\.0\.attention\.sinks' is recorded as BF16"):
        convert(tmp_path / "b.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()

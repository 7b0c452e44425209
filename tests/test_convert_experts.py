"""Packing the experts of GPT-OSS checkpoints that have them in wider types."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from unpacked import write_unpacked

from jax_mxfp4 import cli, quantize
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import CheckpointError, open_checkpoint, read_parameters
from jax_mxfp4.convert import convert, round_to_nearest
from jax_mxfp4.format import decode
from jax_mxfp4.inspection import diff
from jax_mxfp4.models.gpt_oss import mini_path, read_config
from jax_mxfp4.models.gpt_oss.params import parameter_specs

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
HF, OPENAI, GGUF = GOLDEN / "hf", GOLDEN / "original", GOLDEN / "tiny-mxfp4.gguf"
GATE_UP = "model.layers.2.mlp.experts.gate_up_proj"


def decoded(blocks, scales):
    """Exactly what the blocks stand for, as bfloat16."""
    return np.asarray(decode(blocks, scales, ml_dtypes.bfloat16))


def load_folder(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture
def hugging_face(tmp_path):
    return write_unpacked(tmp_path / "bf16", "huggingface")


def assert_same_values(left, right):
    unequal = [difference for difference in diff(left, right) if difference.different]
    assert not unequal


@pytest.mark.parametrize(("name", "layout"), [("a", None), ("a", "openai"), ("a.gguf", None)])
def test_experts_of_transformers_into_every_layout(tmp_path, hugging_face, name, layout):
    convert(hugging_face, tmp_path / name, layout)
    assert_same_values(HF, tmp_path / name)
    expected = {"a": OPENAI if layout else HF, "a.gguf": GGUF}[name]
    assert set(open_checkpoint(tmp_path / name).tensors) == set(open_checkpoint(expected).tensors)


def test_the_configuration_says_that_experts_are_packed(tmp_path, hugging_face):
    convert(hugging_face, tmp_path / "packed")
    written, golden, source = (
        json.loads((folder / "config.json").read_text())
        for folder in (tmp_path / "packed", HF, hugging_face)
    )
    assert written == {**source, "quantization_config": golden["quantization_config"]}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_element_types_and_openai_names(tmp_path, dtype):
    source = write_unpacked(tmp_path / "wide", "openai", dtype)
    convert(source, tmp_path / "packed", "openai")
    assert_same_values(OPENAI, tmp_path / "packed")


def test_a_gguf_file_with_wide_experts(tmp_path):
    write_unpacked(tmp_path / "wide.gguf", "gguf")
    for name in ("packed", "packed.gguf"):
        convert(tmp_path / "wide.gguf", tmp_path / name)
        assert_same_values(GGUF, tmp_path / name)
    convert(tmp_path / "wide.gguf", tmp_path / "original", "openai")
    assert_same_values(GGUF, tmp_path / "original")


@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_scale_rules(tmp_path, hugging_face, rule):
    tensors = load_file(hugging_face / "model.safetensors")
    random = np.random.default_rng(0).normal(size=tensors[GATE_UP].shape)
    tensors[GATE_UP] = random.astype(ml_dtypes.bfloat16)
    save_file(tensors, hugging_face / "model.safetensors")
    convert(hugging_face, tmp_path / "packed", pack=round_to_nearest(rule))
    expected = quantize(np.ascontiguousarray(tensors[GATE_UP].swapaxes(1, 2)), rule)
    found = load_folder(tmp_path / "packed")
    np.testing.assert_array_equal(found[f"{GATE_UP}_blocks"], expected.blocks)
    np.testing.assert_array_equal(found[f"{GATE_UP}_scales"], expected.scales)


def test_the_built_in_model_is_what_the_rule_floor_makes_of_its_bfloat16(tmp_path):
    source = GOLDEN.parent / "mini-gptoss" / "bf16"
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--scale-rule", "floor"]
    assert cli.run(arguments) == 0
    expected, found = load_folder(mini_path()), load_folder(tmp_path / "packed")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes(), name
    assert read_config(tmp_path / "packed") == read_config(mini_path())


def test_experts_are_packed_one_by_one_and_once(tmp_path, hugging_face):
    names = []
    nearest = round_to_nearest()

    def pack(name, matrix):
        assert matrix.ndim == 2 and matrix.flags.c_contiguous
        names.append(name)
        return nearest(name, matrix)

    convert(hugging_face, tmp_path / "packed", pack=pack)
    config = read_config(HF)
    assert sorted(names) == sorted(
        f"model.layers.{layer}.mlp.experts.{name}_proj.{expert}"
        for layer in range(config.num_layers)
        for name in ("gate_up", "down")
        for expert in range(config.num_experts)
    )


def test_progress_counts_what_is_read(tmp_path, hugging_face):
    calls = []
    convert(hugging_face, tmp_path / "packed", progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in load_folder(hugging_face).values())
    assert calls[-1][1:] == (total, total)


def test_packed_experts_are_not_packed_again(tmp_path):
    with pytest.raises(CheckpointError, match="packed already, nothing is left to pack"):
        convert(HF, tmp_path / "packed", pack=round_to_nearest())
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_is_not_for_gpt_oss(tmp_path, hugging_face, capsys):
    arguments = ["convert", str(hugging_face), str(tmp_path / "packed"), "--pack", ".*"]
    assert cli.run(arguments) == 1
    assert "of GPT-OSS that is always the experts" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_every_tensor_that_does_not_fit_is_listed(tmp_path, hugging_face):
    tensors = load_file(hugging_face / "model.safetensors")
    shape = tensors[GATE_UP].shape
    tensors[GATE_UP] = np.ascontiguousarray(tensors[GATE_UP].swapaxes(1, 2))
    del tensors["model.layers.0.mlp.experts.down_proj"]
    tensors["model.layers.1.mlp.experts.down_proj"] = np.zeros(3, np.float32)
    tensors["stray"] = np.zeros(3, np.float32)
    save_file(tensors, hugging_face / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(hugging_face, tmp_path / "packed")
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert "'model.layers.0.mlp.experts.down_proj': missing" in text
    swapped = [shape[0], shape[2], shape[1]]
    assert f"'{GATE_UP}': expected BF16 or F16 or F32 {list(shape)}, found BF16 {swapped}" in text
    assert "'stray': unexpected" in text


def test_some_packed_and_some_not(tmp_path):
    source = shutil.copytree(HF, tmp_path / "mixed")
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{GATE_UP}_blocks" in tensors:
            experts = decoded(*(tensors.pop(f"{GATE_UP}_{part}") for part in ("blocks", "scales")))
            tensors[GATE_UP] = np.ascontiguousarray(experts.swapaxes(1, 2))
            save_file(tensors, file)
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"_blocks': unexpected"):
        convert(source, tmp_path / "packed")


def test_a_foreign_gguf_file_into_the_layout_of_openai(tmp_path):
    """Its numbers have been rounded to float32."""
    convert(GGUF, tmp_path / "original", "openai")
    specs = parameter_specs(read_config(GGUF))
    found = dict(read_parameters(open_checkpoint(tmp_path / "original"), specs))
    for name, value in read_parameters(open_checkpoint(OPENAI), specs):
        if isinstance(value, MXFP4Array):
            np.testing.assert_array_equal(found[name].blocks, value.blocks)
        else:
            np.testing.assert_array_equal(found[name].astype(np.float32), value.astype(np.float32))

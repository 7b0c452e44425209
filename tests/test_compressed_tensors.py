"""Reading weights that compressed-tensors has packed."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_mxfp4 import dequantize
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import (
    CheckpointError,
    ParameterSpec,
    WeightsFolder,
    place_parameters,
)

GOLDEN = Path(__file__).parent / "golden" / "tiny-llama-mxfp4"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "packed", tmp_path / "packed")


def edit_tensors(folder, **changes):
    """Replace tensors of UP; None removes one."""
    tensors = load_file(folder / "model.safetensors")
    for part, value in changes.items():
        tensors.pop(f"{UP}.{part}", None)
        if value is not None:
            tensors[f"{UP}.{part}"] = value
    save_file(tensors, folder / "model.safetensors")


def edit_quantization(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def problems_of(folder):
    with pytest.raises(CheckpointError) as caught:
        WeightsFolder(folder)
    return caught.value.problems


def test_packed_weights_decode_to_what_compressed_tensors_decodes():
    weights = WeightsFolder(GOLDEN / "packed")
    decoded = load_file(GOLDEN / "decoded.safetensors")
    packed = {name for name, spec in weights.specs.items() if spec.packed}
    assert packed == set(decoded) - {"tokens", "logits"}
    for name in packed:
        weight = weights.read(name)
        assert isinstance(weight, MXFP4Array)
        assert weight.shape == weights.specs[name].shape == decoded[name].shape
        np.testing.assert_array_equal(dequantize(weight, jnp.bfloat16), decoded[name])


def test_packed_weights_keep_their_bytes():
    stored = load_file(GOLDEN / "packed" / "model.safetensors")
    weight = WeightsFolder(GOLDEN / "packed").read(f"{UP}.weight")
    assert weight.blocks.tobytes() == stored[f"{UP}.weight_packed"].tobytes()
    np.testing.assert_array_equal(weight.scales, stored[f"{UP}.weight_scale"])


def test_other_weights_are_arrays_under_the_same_names():
    packed, plain = WeightsFolder(GOLDEN / "packed"), WeightsFolder(GOLDEN / "bf16")
    assert packed.config["model_type"] == plain.config["model_type"] == "llama"
    assert set(packed.specs) == set(plain.specs)
    for name, spec in packed.specs.items():
        assert plain.specs[name] == ParameterSpec(spec.shape)
        if not spec.packed:
            np.testing.assert_array_equal(packed.read(name), plain.read(name), strict=True)


def test_parts():
    weights = WeightsFolder(GOLDEN / "packed")
    for name, part in (
        (f"{UP}.weight", (slice(3, 9),)),
        (f"{UP}.weight", (slice(3, 9), slice(1, 2))),
        ("lm_head.weight", (slice(3, 9), slice(1, 2))),
        ("model.norm.weight", (slice(60, 99),)),
    ):
        whole, found = weights.read(name), weights.read(name, part)
        if isinstance(whole, MXFP4Array):
            np.testing.assert_array_equal(found.blocks, whole.blocks[part], strict=True)
            np.testing.assert_array_equal(found.scales, whole.scales[part], strict=True)
        else:
            np.testing.assert_array_equal(found, whole[part], strict=True)


def test_weights_onto_devices():
    weights = WeightsFolder(GOLDEN / "packed")
    placed = dict(place_parameters(weights, dtype=jnp.float32))
    assert list(placed) == list(weights.specs)
    for name, weight in weights.items():
        assert {type(leaf) for leaf in jax.tree.leaves(placed[name])} == {type(jnp.zeros(0))}
        if isinstance(weight, MXFP4Array):
            np.testing.assert_array_equal(placed[name].blocks, weight.blocks)
        else:
            expected = weight.astype(np.float32)
            np.testing.assert_array_equal(placed[name], expected, strict=True)


def test_items_report_every_byte():
    weights = WeightsFolder(GOLDEN / "packed")
    calls = []
    items = dict(weights.items(lambda *call: calls.append(call)))
    assert list(items) == list(weights.specs)
    tensors = load_file(GOLDEN / "packed" / "model.safetensors").values()
    total = sum(tensor.nbytes for tensor in tensors)
    assert [call[0] for call in calls] == list(weights.specs)
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[-1] == total
    assert {call[2] for call in calls} == {total}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weight_scale": None}, "expected 'weight_scale' U8 [128, 2] beside it, found none"),
        (
            {"weight_scale": np.zeros((2, 128), np.uint8)},
            "expected 'weight_scale' U8 [128, 2] beside it, found U8 [2, 128]",
        ),
        (
            {"weight_scale": np.zeros((128, 2), np.float32)},
            "expected 'weight_scale' U8 [128, 2] beside it, found F32 [128, 2]",
        ),
        (
            {"weight_packed": np.zeros((128, 24), np.uint8)},
            "expected U8 [N, K / 2] with K a multiple of 32, found U8 [128, 24]",
        ),
        (
            {"weight_packed": np.zeros((4, 32, 32), np.uint8)},
            "expected U8 [N, K / 2] with K a multiple of 32, found U8 [4, 32, 32]",
        ),
        (
            {"weight_packed": np.zeros((128, 32), np.int8)},
            "expected U8 [N, K / 2] with K a multiple of 32, found I8 [128, 32]",
        ),
        ({"weight": np.zeros((128, 64), np.float32)}, "'model.layers.1.mlp.up_proj.weight' is"),
        ({"weight_packed": None}, "'model.layers.1.mlp.up_proj.weight_scale': unexpected"),
        ({"weight_global_scale": np.ones(1, np.float32)}, "weight_global_scale': unexpected"),
    ],
)
def test_tensors_that_do_not_fit_together(folder, change, expected):
    edit_tensors(folder, **change)
    (problem,) = problems_of(folder)
    assert problem.startswith("model.safetensors: tensor 'model.layers.1.mlp.up_proj.")
    assert expected in problem


def test_all_tensors_that_do_not_fit_are_listed(folder):
    edit_tensors(
        folder, weight_scale=np.zeros((1, 2), np.uint8), weight_g_idx=np.zeros(64, np.int32)
    )
    assert len(problems_of(folder)) == 2


def test_packed_tensors_without_a_configuration(folder):
    shutil.copy(GOLDEN / "bf16" / "config.json", folder)
    assert problems_of(folder) == (
        "expected *.weight_packed tensors if and only if config.json has 'quantization_config'",
    )


def test_a_configuration_without_packed_tensors(folder):
    shutil.copy(GOLDEN / "bf16" / "model.safetensors", folder)
    assert len(problems_of(folder)) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda q: q.update(quant_method="mxfp4"), "quant_method': expected 'compressed-tensors'"),
        (lambda q: q.update(config_groups={}), "config_groups': expected groups, found {}"),
        (lambda q: q["config_groups"].update(b=None), "b': expected an object with 'weights'"),
        (
            lambda q: q["config_groups"]["group_0"].update(format="nvfp4-pack-quantized"),
            "format': expected 'mxfp4-pack-quantized', found 'nvfp4-pack-quantized'",
        ),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=16), "found 16"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False), "found False"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=1), "found 1"),
        (lambda q: q["config_groups"]["group_0"]["weights"].pop("type"), "found None"),
        (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config'"),
        (lambda q: q.update(transform_config={"config_groups": {"u": {}}}), "transform_config'"),
    ],
)
def test_configurations_of_other_formats(folder, change, expected):
    edit_quantization(folder, change)
    (problem,) = problems_of(folder)
    assert problem.startswith("'quantization_config.")
    assert expected in problem


def test_a_configuration_that_is_no_object(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": "mxfp4"}))
    assert problems_of(folder) == ("'quantization_config': expected an object, found 'mxfp4'",)


def test_everything_that_differs_in_a_configuration_is_listed(folder):
    def change(quantization):
        quantization["config_groups"]["group_0"]["weights"].update(num_bits=8, type="int")
        quantization["transform_config"] = {"config_groups": {"u": {}}}

    edit_quantization(folder, change)
    assert len(problems_of(folder)) == 3


def test_defaults_and_the_format_of_a_group(folder):
    def change(quantization):
        quantization["format"] = "mixed-precision"
        for key in ("strategy", "symmetric", "dynamic", "scale_dtype"):
            del quantization["config_groups"]["group_0"]["weights"][key]

    edit_quantization(folder, change)
    assert WeightsFolder(folder).specs == WeightsFolder(GOLDEN / "packed").specs

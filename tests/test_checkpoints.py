"""Reading whole, well-formed checkpoints in both published layouts."""

import itertools
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import (
    CheckpointError,
    Reader,
    SafetensorsFolder,
    detect_layout,
    read_parameters,
)
from jax_mxfp4.models.gpt_oss import read_config
from jax_mxfp4.models.gpt_oss.params import parameter_specs

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
HF, ORIGINAL = GOLDEN / "hf", GOLDEN / "original"


def parameters(folder: Path) -> dict[str, np.ndarray | MXFP4Array]:
    return dict(read_parameters(SafetensorsFolder(folder), parameter_specs(read_config(folder))))


def assert_same(left: np.ndarray | MXFP4Array, right: np.ndarray | MXFP4Array) -> None:
    assert type(left) is type(right)
    if isinstance(left, MXFP4Array) and isinstance(right, MXFP4Array):
        np.testing.assert_array_equal(left.blocks, right.blocks)
        np.testing.assert_array_equal(left.scales, right.scales)
    else:
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def split(source: Path, target: Path, names: list[str]) -> None:
    """Writes the tensors of `source`'s only file to `target`, spread over files called `names`."""
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    target.mkdir()
    shutil.copy(source / "config.json", target)
    for i, name in enumerate(names):
        part = {key: tensors[key] for key in list(tensors)[i :: len(names)]}
        save_file(part, target / name)


def test_headers_describe_the_stored_tensors():
    reader: Reader = SafetensorsFolder(HF)
    assert reader.path == HF
    assert len(reader.tensors) == 3 + 4 * 19
    blocks = reader.tensors["model.layers.2.mlp.experts.gate_up_proj_blocks"]
    assert (blocks.dtype, blocks.shape) == ("U8", (8, 128, 3, 16))
    assert blocks.nbytes == 8 * 128 * 3 * 16
    assert blocks.file.name == "model-00001-of-00001.safetensors"
    sinks = reader.tensors["model.layers.0.self_attn.sinks"]
    assert (sinks.dtype, sinks.shape, sinks.nbytes) == ("BF16", (4,), 8)


def test_read_gives_the_stored_bytes():
    reader = SafetensorsFolder(ORIGINAL)
    expected = load_file(ORIGINAL / "model.safetensors")
    assert set(reader.tensors) == set(expected)
    for name, array in expected.items():
        found = reader.read(name)
        assert found.dtype == array.dtype
        assert found.tobytes() == array.tobytes()
        np.testing.assert_array_equal(reader.read(name, slice(1, 3)), array[1:3])


def test_layouts_are_told_apart_by_tensor_names():
    assert detect_layout(SafetensorsFolder(HF)) == "huggingface"
    assert detect_layout(SafetensorsFolder(ORIGINAL)) == "openai"


def test_packed_parameters_are_the_stored_bytes():
    reader = SafetensorsFolder(HF)
    found = parameters(HF)["layers.1.mlp.gate_up"]
    assert isinstance(found, MXFP4Array)
    assert found.shape == (8, 128, 96)
    assert isinstance(found.blocks, np.ndarray)
    prefix = "model.layers.1.mlp.experts.gate_up_proj_"
    np.testing.assert_array_equal(found.blocks, reader.read(prefix + "blocks"))
    np.testing.assert_array_equal(found.scales, reader.read(prefix + "scales"))


def test_dense_parameters_keep_their_dtype():
    assert parameters(HF)["layers.0.attention.q.weight"].dtype == ml_dtypes.bfloat16


def test_both_layouts_hold_the_same_parameters():
    hugging_face, original = parameters(HF), parameters(ORIGINAL)
    assert list(hugging_face) == list(original)
    for name, array in hugging_face.items():
        assert_same(array, original[name])


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors"],
        ["a.safetensors", "b.safetensors"],
        [f"model-0000{i}-of-00002.safetensors" for i in (0, 1, 2)],
        [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)],
    ],
    ids=["single", "unnumbered", "zero-based", "one-based"],
)
def test_files_without_an_index(tmp_path, names):
    split(ORIGINAL, tmp_path / "split", names)
    expected = parameters(ORIGINAL)
    for name, array in parameters(tmp_path / "split").items():
        assert_same(array, expected[name])


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ([f"model-0000{i}-of-00003.safetensors" for i in (0, 1, 3)], "00002-of-00003"),
        ([f"model-0000{i}-of-00003.safetensors" for i in (1, 2)], "00003-of-00003"),
    ],
)
def test_missing_shards_without_an_index(tmp_path, names, missing):
    split(ORIGINAL, tmp_path / "split", names)
    with pytest.raises(CheckpointError, match=rf"model-{missing}\.safetensors: missing file"):
        SafetensorsFolder(tmp_path / "split")


def test_progress_counts_all_bytes_in_order():
    reader = SafetensorsFolder(ORIGINAL)
    specs = parameter_specs(read_config(ORIGINAL))
    calls = []
    for _ in read_parameters(reader, specs, lambda *call: calls.append(call)):
        pass
    assert [name for name, _, _ in calls] == list(specs)
    done = [bytes_done for _, bytes_done, _ in calls]
    assert all(a < b for a, b in itertools.pairwise(done))
    total = sum(info.nbytes for info in reader.tensors.values())
    assert {bytes_total for _, _, bytes_total in calls} == {total}
    assert done[-1] == total

"""Writing safetensors files, in any order of rows."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jax_mxfp4.checkpoints import SafetensorsFolder
from jax_mxfp4.checkpoints.safetensors_writer import NewTensor, SafetensorsWriter

TENSORS = {
    "odd": NewTensor("U8", (3, 5)),
    "half": NewTensor("BF16", (4, 2)),
    "single": NewTensor("F32", (2,)),
}
VALUES = {
    "odd": np.arange(15, dtype=np.uint8).reshape(3, 5),
    "half": np.arange(8).reshape(4, 2).astype(ml_dtypes.bfloat16),
    "single": np.array([np.nan, 2], np.float32),
}


def test_rows_in_any_order(tmp_path):
    with SafetensorsWriter(tmp_path, TENSORS) as writer:
        writer.write("half", VALUES["half"][2:], 2)
        writer.write("single", VALUES["single"])
        writer.write("odd", VALUES["odd"])
        writer.write("half", VALUES["half"][:2])
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(VALUES)
    for name, value in VALUES.items():
        np.testing.assert_array_equal(found[name], value, strict=True)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_wide_types_are_aligned(tmp_path):
    with SafetensorsWriter(tmp_path, TENSORS):
        pass
    content = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert (8 + size) % 8 == 0
    for name, width in (("single", 4), ("half", 2)):
        assert header[name]["data_offsets"][0] % width == 0


def test_shards_have_an_index(tmp_path):
    with SafetensorsWriter(tmp_path, TENSORS, max_shard_bytes=20) as writer:
        for name, value in VALUES.items():
            writer.write(name, value)
    assert set(writer.file_of.values()) == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    folder = SafetensorsFolder(tmp_path)
    for name, value in VALUES.items():
        np.testing.assert_array_equal(folder.read(name), value, strict=True)


@pytest.mark.parametrize(
    ("array", "row"),
    [
        (np.zeros((3, 5), np.uint16), 0),
        (np.zeros((3, 4), np.uint8), 0),
        (np.zeros((3, 5), np.uint8), 1),
    ],
)
def test_what_does_not_fit(tmp_path, array, row):
    with (
        SafetensorsWriter(tmp_path, TENSORS) as writer,
        pytest.raises(ValueError, match=r"tensor 'odd': .* does not fit in U8"),
    ):
        writer.write("odd", array, row)

"""Parameters onto devices as they are read."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import (
    GptOssParameters,
    ParameterSpec,
    SafetensorsFolder,
    WeightsFolder,
    gguf_parameters,
    open_checkpoint,
    place_parameters,
    placement,
)
from jax_mxfp4.checkpoints.gguf_blocks import unpack_mxfp4
from jax_mxfp4.checkpoints.gpt_oss_layout import plan
from jax_mxfp4.checkpoints.reader import read_part
from jax_mxfp4.models.gpt_oss import GptOss, read_config
from jax_mxfp4.models.gpt_oss.params import parameter_specs

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
PATHS = [GOLDEN / "hf", GOLDEN / "original", GOLDEN / "tiny-mxfp4.gguf"]


def parameters_of(path):
    return GptOssParameters(open_checkpoint(path), parameter_specs(read_config(path)))


def test_several_devices():
    program = Path(__file__).parent / "placement_program.py"
    flags = "--xla_force_host_platform_device_count=4"
    process = subprocess.run(
        [sys.executable, program, *PATHS],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


class Made:
    """Parameters that are made up, and what happened to them."""

    def __init__(self, **arrays):
        self.arrays = arrays
        self.specs = {
            name: ParameterSpec(array.shape, isinstance(array, MXFP4Array))
            for name, array in arrays.items()
        }
        self.events = []

    def read(self, name, part=()):
        self.events.append(f"read {name}")
        return self.arrays[name][part] if part else self.arrays[name]

    def stored_bytes(self, name):
        return self.arrays[name].nbytes


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_cpu_device_takes_over_what_was_read(path):
    parameters, seen = parameters_of(path), {}
    read = parameters.read

    def remember(name, part=()):
        seen[name] = read(name, part)
        return seen[name]

    parameters.read = remember
    for name, placed in place_parameters(parameters):
        for leaf, array in zip(jax.tree.leaves(placed), jax.tree.leaves(seen[name]), strict=True):
            assert leaf.unsafe_buffer_pointer() == array.ctypes.data, name


def test_dense_parameters_are_converted():
    values = np.array([[1.5, -2.25, 1e-3]], ml_dtypes.bfloat16)
    packed = MXFP4Array(np.zeros((2, 1, 16), np.uint8), np.zeros((2, 1), np.uint8))
    made = Made(a=values, b=packed)
    placed = dict(place_parameters(made, np.float32))
    assert placed["a"].dtype == np.float32
    np.testing.assert_array_equal(placed["a"], values.astype(np.float32))
    assert placed["b"].blocks.dtype == np.uint8
    assert dict(place_parameters(made))["a"].dtype == ml_dtypes.bfloat16


def test_transfers_under_way_are_bounded(monkeypatch):
    """Before something is read, all is waited for but the last 100 bytes and what it adds."""
    made = Made(**{name: np.zeros(size, np.uint8) for name, size in SIZES.items()})
    names = {}

    def put(array, target):
        (name,) = (name for name, one in made.arrays.items() if one is array)
        names[id(array)] = name
        return array

    def wait(array):
        made.events.append(f"wait {names[id(array)]}")
        return array

    monkeypatch.setattr(placement.jax, "device_put", put)
    monkeypatch.setattr(placement.jax, "block_until_ready", wait)
    monkeypatch.setattr(placement, "_IN_FLIGHT", 100)
    list(place_parameters(made))
    assert made.events == [
        *("read a", "read b", "wait a", "read c", "wait b", "wait c", "read d"),
        *("wait d", "read e", "read f"),
    ]


SIZES = {"a": 40, "b": 50, "c": 30, "d": 500, "e": 60, "f": 40}


@pytest.mark.parametrize("dtype", [None, np.float32])
def test_memory_beyond_the_arrays(tmp_path, monkeypatch, dtype):
    """No tensor is held twice, not even where it is converted."""
    monkeypatch.setattr(placement, "_PIECE", 2**14)
    size, count = 2**20, 6
    tensors = {f"w{i}": np.zeros((16, size // 16), ml_dtypes.bfloat16) for i in range(count)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    del tensors
    weights = WeightsFolder(tmp_path)
    tracemalloc.start()
    placed = dict(place_parameters(weights, dtype))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = sum(array.nbytes for array in placed.values())
    assert arrays == (2 if dtype is None else 4) * size * count
    assert peak < arrays + size


def test_conversion_in_pieces_is_that_of_the_whole(monkeypatch):
    monkeypatch.setattr(placement, "_PIECE", 5000)  # several of each matrix
    for path in PATHS:
        parameters = parameters_of(path)
        for name, array in place_parameters(parameters, np.float16):
            if not isinstance(array, MXFP4Array):
                expected = np.asarray(parameters.read(name)).astype(np.float16)
                np.testing.assert_array_equal(array, expected, strict=True)


def test_progress_counts_the_bytes_of_files():
    parameters = parameters_of(PATHS[0])
    calls = []
    for _ in place_parameters(parameters, np.float32, progress=lambda *call: calls.append(call)):
        pass
    total = sum(info.nbytes for info in SafetensorsFolder(PATHS[0]).tensors.values())
    assert [name for name, _, _ in calls] == list(parameters.specs)
    assert calls[-1][1:] == (total, total)


def test_default_device_is_left_open():
    model = GptOss.from_pretrained(PATHS[0])
    assert not any(leaf.committed for leaf in jax.tree.leaves(model))
    model = GptOss.from_pretrained(PATHS[0], sharding=jax.devices()[0])
    assert all(leaf.committed for leaf in jax.tree.leaves(model))


def test_a_target_of_another_kind():
    with pytest.raises(TypeError, match=r"sharding: expected a jax\.Device, a .* found str"):
        next(place_parameters(parameters_of(PATHS[0]), sharding="cpu"))


PARTS = [(slice(2, 5),), (slice(1, 7), slice(3, 50)), (slice(0, 8), slice(7, 8), slice(1, 2))]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_parts_of_packed_parameters(path, part):
    parameters = parameters_of(path)
    for name in ("layers.1.mlp.gate_up", "layers.1.mlp.down"):
        whole, found = parameters.read(name), parameters.read(name, part)
        np.testing.assert_array_equal(found.scales, whole.scales[part], strict=True)
        np.testing.assert_array_equal(found.blocks, whole.blocks[part], strict=True)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
@pytest.mark.parametrize("part", [(slice(1, 3),), (slice(2, 4), slice(5, 31))], ids=str)
def test_parts_of_dense_parameters(path, part):
    parameters = parameters_of(path)
    for name in ("layers.1.attention.k.weight", "layers.0.mlp.gate_up_bias", "embedding"):
        whole = parameters.read(name)
        np.testing.assert_array_equal(parameters.read(name, part), whole[part], strict=True)


def test_a_reader_that_makes_rows_up_is_asked_once_for_each(monkeypatch):
    monkeypatch.setattr(gguf_parameters, "_CHUNK", 64)
    source = plan("gguf", {"layers.0.mlp.gate_up": SPEC})["layers.0.mlp.gate_up"]
    stored = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 2, 17), np.uint8)
    calls = []

    class Computed:
        def read(self, name, rows=None):
            half = int("up" in name)
            calls.append((half, rows.start, rows.stop))
            return stored[half][rows]

    found = gguf_parameters.read_gguf(Computed(), source, SPEC)
    assert calls == [(half, row, row + 1) for half in (0, 1) for row in range(3)]
    for half in (0, 1):
        blocks, scales = unpack_mxfp4(stored[half])
        np.testing.assert_array_equal(found.blocks[:, half::2], blocks)
        np.testing.assert_array_equal(found.scales[:, half::2], scales)


SPEC = ParameterSpec((3, 8, 64), packed=True)


def test_a_reader_that_has_no_files():
    class Computed:
        def read(self, name, rows=None):
            return np.arange(60).reshape(5, 4, 3)[rows or slice(None)]

    part = (slice(1, 3), slice(2, 4), slice(1, 2))
    expected = np.arange(60).reshape(5, 4, 3)[part]
    np.testing.assert_array_equal(read_part(Computed(), "w", part), expected)

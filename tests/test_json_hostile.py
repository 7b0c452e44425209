"""JSON made to do harm, in every place that JSON is read from: one clear error each."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest

from jax_mxfp4.checkpoints import (
    CheckpointError,
    SafetensorsFolder,
    WeightsFolder,
    parse_json_object,
)
from jax_mxfp4.checkpoints.errors import shorten
from jax_mxfp4.models.gpt_oss import load_tokenizer, mini_path, read_config

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
PLACES = {
    "config.json": read_config,
    "generation_config.json": read_config,
    "config.json of any model": WeightsFolder,
    "model.safetensors.index.json": SafetensorsFolder,
    "tokenizer.json": load_tokenizer,
}
BOMBS = {
    "lists": (b'{"a":' + b"[" * 200_000, "is not valid JSON"),
    "objects": (b'{"a":' * 200_000, "is not valid JSON"),
    "closed": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON"),
    "integer": (b'{"num_local_experts":' + b"9" * 100_000 + b"}", "is not valid JSON"),
    "no UTF-8": (b'{"a":"\xff"}', "is not valid JSON"),
    "duplicates": (
        b'{"a":{"b":1,"b":2},"c":1,"c":2,"c":3}',
        r"2 problems\n.*'b': occ.*\n.*'c': occ",
    ),
    "text": (b'"' + b"a" * 1_000_000 + b'"', "expected a JSON object, found str"),
    "null": (b"null", "expected a JSON object, found NoneType"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = shutil.copytree(GOLDEN / "hf", tmp_path / "hf")
    shutil.copy(mini_path() / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("place", PLACES)
def test_bomb(folder, place, bomb):
    content, message = BOMBS[bomb]
    file = folder / place.split()[0]
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            PLACES[place](folder)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert caught.value.where == str(file)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("place", PLACES)
def test_a_file_of_gigabytes_is_not_read(folder, place):
    name = place.split()[0]
    os.truncate(folder / name, 2**34)  # a hole: it takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"{name}: expected at most \d+ bytes, found"):
            PLACES[place](folder)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


VALUES = {
    "string": "a" * 500_000,
    "list": [["b" * 1000] * 20] * 20,
    "object": {str(i): i for i in range(10_000)},
    "nested": json.loads("[" * 300 + "]" * 300),
    "integer": 10**4000,
    "surrogate": "\ud800",
}
KEYS = (
    *("vocab_size", "rms_norm_eps", "num_hidden_layers", "layer_types", "hidden_act", "model_type"),
    *("rope_scaling", "quantization_config", "tie_word_embeddings", "num_experts_per_tok"),
)


@pytest.mark.parametrize("value", VALUES)
def test_values_are_shortened_in_messages(folder, value):
    data = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()
    data |= dict.fromkeys(KEYS, VALUES[value])
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError) as caught:
        read_config(folder)
    assert len(caught.value.problems) >= 5
    assert len(str(caught.value)) < 5000
    str(caught.value).encode()  # printable, whatever the file has


def test_tensor_names_are_shortened_too(folder):
    index = {"weight_map": {"a" * 1_000_000: "../b.safetensors", "c": "d" * 1_000_000}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(folder)
    assert len(caught.value.problems) == 2
    assert len(str(caught.value)) < 5000


def test_many_problems_are_counted(tmp_path):
    error = CheckpointError(tmp_path, [f"tensor {i}" for i in range(1500)])
    assert len(error.problems) == 1500
    assert str(error).count("\n") == 1001
    assert str(error).endswith("tensor 999\n  - and 500 more")


def test_what_is_short_is_shown_as_it_is():
    for value in (None, True, 1.5, 2**64, "mxfp4", [1, 2], {"a": [None]}):
        assert shorten(value) == repr(value)
    assert parse_json_object(Path("x"), '{"a": [NaN, 1e999]}')["a"][1] == float("inf")


TOKENIZERS = {
    "no model": b"{}",
    "model": b'{"model": 5}',
    "version": b'{"version": "9", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "merges": b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
    "prefix": b'{"model": {"type": "BPE", "continuing_subword_prefix": "abcd", '
    b'"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}',
    "id": b'{"model": {"type": "BPE", "vocab": {"a": 18446744073709551616}, "merges": []}}',
    "surrogate": b'{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}',
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_no_tokenizer(folder, case):
    (folder / "tokenizer.json").write_bytes(TOKENIZERS[case])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is no tokenizer: "):
        load_tokenizer(folder)

"""Safetensors files that are damaged or made to do harm: one clear error each."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from jax_mxfp4.checkpoints import CheckpointError, SafetensorsFolder, WeightsFolder
from jax_mxfp4.checkpoints.safetensors_header import MAX_HEADER_BYTES
from jax_mxfp4.models.gpt_oss import load_params, read_config

GOLDEN = Path(__file__).parent / "golden" / "tiny-gptoss"
NAME = "model.safetensors"


def safetensors(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start: int, end: int, shape=None, dtype="U8") -> dict:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape,
            "data_offsets": [start, end]}  # fmt: skip


U8 = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
NO_HEADER = "truncated or damaged safetensors file: expected the length of a header of at most"
NO_JSON = "truncated or damaged safetensors file: the header is not valid JSON: "

HOSTILE = {
    "empty": (b"", f"{NO_HEADER} 0 bytes, found 0 in a file of 0 bytes"),
    "seven bytes": (b"\1\0\0\0\0\0\0", NO_HEADER),
    "length 0": (safetensors(b"", b"{}"), NO_HEADER),
    "length 2**63": (safetensors(b"{}", length=2**63), f"found {2**63} in a file of 10 bytes"),
    "length 2**64 - 1": (b"\xff" * 64, f"found {2**64 - 1} in a file of 64 bytes"),
    "length + 1": (safetensors(b"{}", length=3), f"{NO_HEADER} 2 bytes, found 3"),
    "no JSON": (safetensors(b"not json"), NO_JSON),
    "no UTF-8": (safetensors(b'{"\xff\xff\xff":1}'), NO_JSON),
    "nested": (safetensors(b'{"a":' * 100_000), NO_JSON),
    "digits": (safetensors(b'{"a":' + b"9" * 5000 + b"}"), NO_JSON),
    "list": (safetensors(b"[]"), "expected a JSON object as header, found list"),
    "no object": (safetensors({"a": 5}), "tensor 'a': expected a JSON object, found int"),
    "no keys": (safetensors({"a": {}}), "tensor 'a': unknown element type None"),
    "dtype": (safetensors({"a": tensor(0, 1, dtype="U9")}, b"\0"), "element type 'U9'"),
    "dtype list": (safetensors({"a": tensor(0, 1, dtype=["U8"])}), r"element type \['U8'\]"),
    "shape": (
        safetensors({"a": tensor(0, 1, [4])}, b"\0"),
        r"tensor 'a': U8 \[4\] needs 4 bytes, found offsets for 1",
    ),
    "negative": (safetensors({"a": tensor(0, 0, [-1])}), r"a shape of whole numbers, found \[-1\]"),
    "fraction": (safetensors({"a": tensor(0, 0, [1.0])}), "a shape of whole numbers"),
    "boolean": (safetensors({"a": tensor(0, 1, [True])}, b"\0"), "a shape of whole numbers"),
    "large": (
        safetensors({"a": tensor(0, 1, [2**62, 4])}, b"\0"),
        "tensor 'a': the shape .* large",
    ),
    "hidden": (safetensors({"a": tensor(0, 0, [2**62, 0, 2**62])}), "tensor 'a': the shape .* lar"),
    "half a byte": (safetensors({"a": tensor(0, 2, [3], "F4")}, b"\0\0"), "needs 1.5 bytes"),
    "offsets": (safetensors({"a": tensor(1, 0, [0])}, b"\0"), r"two offsets, .*, found \[1, 0\]"),
    "three offsets": (
        safetensors({"a": tensor(0, 0) | {"data_offsets": [0, 0, 0]}}),
        "tensor 'a': expected two offsets",
    ),
    "far": (
        safetensors({"a": tensor(2**62, 2**62 + 1)}, b"\0"),
        f"tensor 'a': truncated or damaged: expected at least {2**62 + 1} bytes of data, "
        "the file has 1",
    ),
    "overlap": (
        safetensors({"a": tensor(0, 8), "b": tensor(2, 3), "c": tensor(5, 6)}, bytes(8)),
        r"2 problems\n.*tensor 'b': overlaps tensor 'a'\n.*tensor 'c': overlaps tensor 'a'",
    ),
    "hole": (
        safetensors({"a": tensor(0, 2), "b": tensor(3, 5)}, bytes(5)),
        "tensor 'b': 1 unused bytes after tensor 'a'",
    ),
    "late start": (safetensors({"a": tensor(2, 5)}, bytes(5)), "2 unused bytes after the header"),
    "early end": (
        safetensors({"a": tensor(0, 2)}, bytes(5)),
        "3 unused bytes after tensor 'a', at",
    ),
    "twice": (safetensors(f'{{"a":{U8},"b":1,"a":{U8}}}'.encode(), b"\0"), "'a' occurs twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_one_clear_error(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / NAME).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            SafetensorsFolder(tmp_path)
        # What fifty thousand levels of nesting take; the other cases need a hundredth of it.
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert all(problem.startswith(f"{NAME}: ") for problem in caught.value.problems)
    assert len(str(caught.value)) < 1000


def test_the_cases_differ_from_a_good_file_only_in_what_they_say(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": tensor(2, 6, [1, 2], "BF16"),
        "a": tensor(0, 2),
        "none": tensor(2, 2, [3, 0]),
        "scalar": tensor(6, 7, []),
    }
    (tmp_path / NAME).write_bytes(safetensors(header, bytes(7)))
    reader = SafetensorsFolder(tmp_path)
    assert {name: info.shape for name, info in reader.tensors.items()} == {
        "a": (2,),
        "b": (1, 2),
        "none": (3, 0),
        "scalar": (),
    }
    assert [reader.read(name).shape for name in ("none", "scalar")] == [(3, 0), ()]


def test_all_bad_tensors_are_listed(tmp_path):
    header = {"a": tensor(0, 1, dtype="U9"), "b": tensor(0, 1), "c": tensor(9, 9), "d": None}
    (tmp_path / NAME).write_bytes(safetensors(header, b"\0"))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFolder(tmp_path)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        *("tensor 'a'", "tensor 'c'", "tensor 'd'")
    ]


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    file = tmp_path / NAME
    file.write_bytes(safetensors(b"{", length=2**33))
    os.truncate(file, 2**34)  # a file with a hole: it takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"at most {MAX_HEADER_BYTES} bytes, found"):
            SafetensorsFolder(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def load(folder: Path) -> None:
    load_params(folder, read_config(folder), "float32")


@pytest.mark.parametrize(
    ("source", "read"),
    [
        (GOLDEN / "hf", load),
        (GOLDEN / "original", load),
        (GOLDEN.parent / "tiny-llama-mxfp4" / "packed", WeightsFolder),
    ],
    ids=["huggingface", "openai", "compressed-tensors"],
)
def test_truncated_at_every_percent(tmp_path, source, read):
    folder = shutil.copytree(source, tmp_path / "folder")
    for file in sorted(folder.glob("*.safetensors")):
        whole = file.read_bytes()
        header_end = 8 + int.from_bytes(whole[:8], "little")
        for percent in reversed(range(100)):
            size = len(whole) * percent // 100
            os.truncate(file, size)
            with pytest.raises(CheckpointError, match="truncated or damaged") as caught:
                read(folder)
            start = f"{file.name}: tensor '" if size >= header_end else f"{file.name}: "
            assert all(problem.startswith(start) for problem in caught.value.problems)
        file.write_bytes(whole)


def test_truncated_after_opening(tmp_path):
    folder = shutil.copytree(GOLDEN / "original", tmp_path / "original")
    reader = SafetensorsFolder(folder)
    os.truncate(folder / NAME, 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'norm\.scale': the fil"):
        reader.read("norm.scale")


def test_links_are_followed_as_download_caches_have_them(tmp_path):
    blob = shutil.copy(GOLDEN / "original" / NAME, tmp_path / "8f3a")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / NAME).symlink_to(Path("..") / "8f3a")
    assert set(SafetensorsFolder(folder).tensors) == set(load_file(blob))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda file: file.symlink_to("absent"), "missing file"),
        (lambda file: file.symlink_to(file.name), "missing file"),
        (lambda file: file.symlink_to("/dev/zero"), "expected a file, found a pipe or a device"),
        (os.mkfifo, "expected a file, found a pipe or a device"),
        (Path.mkdir, "expected a file, found a folder"),
    ],
    ids=["dangling", "loop", "device", "pipe", "folder"],
)
@pytest.mark.parametrize("name", [NAME, "config.json", "model.safetensors.index.json"])
def test_what_is_no_file(tmp_path, make, problem, name):
    folder = shutil.copytree(GOLDEN / "original", tmp_path / "original")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    is_json = problem == "missing file" and name != NAME
    assert name in str(caught.value)
    assert ("cannot be read: " if is_json else problem) in str(caught.value)

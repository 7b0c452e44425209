"""GGUF files that are damaged, truncated or made to do harm: one clear error each."""

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jax_mxfp4.checkpoints import CheckpointError, GgufFile, gguf_header, read_parameters
from jax_mxfp4.convert import convert
from jax_mxfp4.models.gpt_oss import read_config
from jax_mxfp4.models.gpt_oss.params import parameter_specs

TINY = Path(__file__).parent / "golden" / "tiny-gptoss" / "tiny-mxfp4.gguf"
WHOLE = TINY.read_bytes()
DATA_START = 5792
U32, STRING, ARRAY = 4, 8, 9


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name.encode()) + struct.pack("<I", kind) + value


def tensor(name="w", shape=(32,), kind=0, offset=0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name.encode()) + dimensions + struct.pack("<IQ", kind, offset)


def gguf(keys=(), infos=(), data=b"\0" * 4096, **changes) -> bytes:
    header = {
        "magic": b"GGUF",
        "version": 3,
        "tensors": len(infos),
        "key_count": len(keys),
    } | changes
    counts = struct.pack("<IQQ", header["version"], header["tensors"], header["key_count"])
    head = header["magic"] + counts + b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + data


HOSTILE = {
    "empty": (b"", "expected a GGUF file, found another format"),
    "magic": (gguf(magic=b"GGJT"), "expected a GGUF file, found another format"),
    "version 1": (gguf(version=1), "expected GGUF version 2 or 3, little endian, found version 1"),
    "big endian": (gguf(version=3 << 24), "found a big-endian file"),
    "tensors": (gguf(tensors=2**63), f"{2**16} tensors and .*, found {2**63} in a file of 4128"),
    "more tensors than bytes": (gguf(tensors=200), "found 200 in a file of 4128 bytes"),
    "keys": (gguf(key_count=2**64 - 1), f"metadata keys and .*, found {2**64 - 1}"),
    "key name": (gguf([struct.pack("<Q", 2**63)]), f"at most 65535 bytes, found {2**63}"),
    "key not text": (gguf([string(b"\xff") + bytes(8)]), "the name of metadata key 0: .* UTF-8"),
    "value length": (
        gguf([key("a", STRING, struct.pack("<Q", 2**62))]),
        f"metadata key 'a' at byte 45 needs {2**62} bytes, the file has",
    ),
    "value type": (gguf([key("a", 77, b"")]), "metadata key 'a': unknown value type 77"),
    "twice": (gguf([key("a", U32, bytes(4))] * 2), "metadata key 'a': occurs twice"),
    "array length": (
        gguf([key("a", ARRAY, struct.pack("<IQ", U32, 2**61))]),
        f"numbers in metadata key 'a' and .*, found {2**61}",
    ),
    "strings": (
        gguf([key("a", ARRAY, struct.pack("<IQ", STRING, 2**40))]),
        f"{2**22} strings in metadata key 'a' and .*, found {2**40}",
    ),
    "nested": (
        gguf([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9)]),
        "metadata key 'a': arrays of arrays are not supported",
    ),
    "alignment 0": (gguf([key("general.alignment", U32, bytes(4))]), "power of two, found 0"),
    "alignment 48": (
        gguf([key("general.alignment", U32, struct.pack("<I", 48))]),
        "'general.alignment': expected a power of two, found 48",
    ),
    "alignment text": (
        gguf([key("general.alignment", STRING, string(b"32"))]),
        "expected a power of two, found '32'",
    ),
    "rank 0": (gguf(infos=[tensor(shape=())] * 2), "expected 1 to 4 dimensions, found 0"),
    "rank": (gguf(infos=[tensor(shape=(1,) * 5)]), "expected 1 to 4 dimensions, found 5"),
    "type": (gguf(infos=[tensor(kind=4)]), "tensor 'w': unknown element type 4"),
    "no elements": (gguf(infos=[tensor(shape=(32, 0))]), r"found shape \[0, 32\]"),
    "row": (gguf(infos=[tensor(shape=(31,), kind=39)]), "multiple of 32 elements in MXFP4"),
    "offset": (gguf(infos=[tensor(offset=8)]), "multiple of 32, found 8"),
    "far": (gguf(infos=[tensor(offset=2**64 - 32)]), "expected 128 bytes from byte"),
    "large": (gguf(infos=[tensor(shape=(2**62, 2**62))]), "but the file has"),
    "duplicate": (gguf(infos=[tensor(), tensor()]), "tensor 'w': occurs twice"),
    "overlap": (
        gguf(infos=[tensor("a", (64,)), tensor("b", offset=32)]),
        "tensor 'b': overlaps tensor 'a'",
    ),
    "overlaps": (
        gguf(infos=[tensor("a", (64,)), tensor("b", (8,), offset=32), tensor("c", offset=128)]),
        r"2 problems\n.*tensor 'b': overlaps tensor 'a'\n.*tensor 'c': overlaps tensor 'a'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_one_clear_error(tmp_path, case):
    content, message = HOSTILE[case]
    file = tmp_path / "hostile.gguf"
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            GgufFile(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert caught.value.where == str(file)


def test_the_cases_differ_from_a_good_file_only_in_what_they_say(tmp_path):
    file = tmp_path / "good.gguf"
    keys = [key("a", U32, bytes(4)), key("b", ARRAY, struct.pack("<IQI", U32, 1, 7))]
    file.write_bytes(gguf(keys, [tensor("a", (64,)), tensor("b", offset=256)]))
    reader = GgufFile(file)
    assert reader.metadata == {"a": 0, "b": np.array([7])}
    assert {name: info.shape for name, info in reader.tensors.items()} == {"a": (64,), "b": (32,)}


def test_all_bad_tensors_are_listed(tmp_path):
    file = tmp_path / "bad.gguf"
    file.write_bytes(gguf(infos=[tensor("a", kind=5), tensor("b", offset=1), tensor("c")]))
    with pytest.raises(CheckpointError) as caught:
        GgufFile(file)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "tensor 'a'",
        "tensor 'b'",
    ]


def test_tensors_in_two_parts_of_a_split_file(tmp_path):
    keys = [key("split.count", U32, struct.pack("<I", 2))]
    for number in (1, 2):
        part = tmp_path / f"a-0000{number}-of-00002.gguf"
        part.write_bytes(gguf(keys, [tensor("a"), tensor("b", offset=128)]))
    with pytest.raises(CheckpointError) as caught:
        GgufFile(tmp_path / "a-00001-of-00002.gguf")
    assert caught.value.problems == tuple(
        f"a-00002-of-00002.gguf: tensor {name!r} is also in a-00001-of-00002.gguf" for name in "ab"
    )


def test_absent(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.gguf: cannot be read: No such file"):
        read_config(tmp_path / "absent.gguf")


def test_truncated_anywhere(tmp_path):
    file = tmp_path / "truncated.gguf"
    file.write_bytes(WHOLE)
    percents = {len(WHOLE) * percent // 100 for percent in range(100)}
    for size in sorted(percents | {*range(0, DATA_START, 61), len(WHOLE) - 1}, reverse=True):
        os.truncate(file, size)
        with pytest.raises(CheckpointError) as caught:
            GgufFile(file)
        assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "value",
    [
        key("a", ARRAY, struct.pack("<IQ", U32, 2**37)),
        key("a", STRING, struct.pack("<Q", 2**39)),
        key("a", ARRAY, struct.pack("<IQQ", STRING, 1, 2**39)),
    ],
    ids=["numbers", "text", "text in a list"],
)
def test_metadata_of_gigabytes_is_not_read(tmp_path, value):
    file = tmp_path / "large.gguf"
    file.write_bytes(gguf([value]))
    os.truncate(file, 2**40)  # a file with a hole: it takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"a header of at most {2**28} bytes, but .*'a'"):
            GgufFile(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda file: file.symlink_to("absent.gguf"), "No such file"),
        (lambda file: file.symlink_to("/dev/zero"), "expected a file, found a pipe or a device"),
        (os.mkfifo, "expected a file, found a pipe or a device"),
    ],
    ids=["dangling", "device", "pipe"],
)
def test_what_is_no_file(tmp_path, make, problem):
    make(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=rf"a\.gguf: cannot be read: {problem}"):
        GgufFile(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("config.json", "[" * 500, "is not valid JSON"),
        ("config.json", '{"a": 1, "a": 2}', "'a': occurs twice"),
        ("config.json", "7", "expected a JSON object, found int"),
        ("generation_config.json", '{"a":' * 10, "is not valid JSON"),
        ("dtypes", '{"norm": ["BF16"]}', r"expected a type that widens .*, found \['BF16'\]"),
        ("dtypes", '{"norm": "U8"}', "expected a type that widens .*, found 'U8'"),
        ("dtypes", "{", "is not valid JSON"),
    ],
)
def test_json_in_metadata(tmp_path, name, text, problem):
    convert(TINY.parent / "hf", tmp_path / "a.gguf")
    old = GgufFile(tmp_path / "a.gguf").metadata[f"jax_mxfp4.{name}"].encode()
    assert len(text) <= len(old)
    content = (tmp_path / "a.gguf").read_bytes()
    # Spaces after JSON mean nothing, and keep all offsets.
    (tmp_path / "b.gguf").write_bytes(content.replace(old, text.encode().ljust(len(old))))
    with pytest.raises(CheckpointError, match=rf"metadata key 'jax_mxfp4\.{name}': {problem}"):
        convert(tmp_path / "b.gguf", tmp_path / "hf")


def test_truncated_while_it_is_opened(tmp_path, monkeypatch):
    """Reads say so, where a memory map would end the process."""
    monkeypatch.setattr(gguf_header, "require_file", lambda file: len(WHOLE))
    file = tmp_path / "tiny.gguf"
    for size in (0, 3, 10, 100, DATA_START - 100):
        file.write_bytes(WHOLE[:size])
        with pytest.raises(
            CheckpointError, match=r"tiny\.gguf: has become shorter: it ends inside"
        ):
            GgufFile(file)


def test_truncated_after_opening(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(WHOLE)
    reader = GgufFile(file)
    file.write_bytes(WHOLE[: len(WHOLE) // 2])
    last = list(reader.tensors)[-1]
    with pytest.raises(CheckpointError, match="the file ends inside its data"):
        reader.read(last)


@settings(
    max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, DATA_START - 1),
            st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8]),
        ),
        min_size=1,
        max_size=4,
    ),
    size=st.just(len(WHOLE)) | st.integers(0, len(WHOLE)),
)
def test_any_other_damage_is_an_error_or_harmless(tmp_path, edits, size):
    content = bytearray(WHOLE)
    for place, replacement in edits:
        content[place : place + len(replacement)] = replacement
    file = tmp_path / "fuzzed.gguf"
    file.write_bytes(content[:size])
    try:
        for _ in read_parameters(GgufFile(file), parameter_specs(read_config(file))):
            pass
    except CheckpointError as error:
        assert error.where.startswith(str(tmp_path))
        assert len(str(error)) < 100_000

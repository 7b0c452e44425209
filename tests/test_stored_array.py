"""Reading any part of an array in a file: the right bytes, in reads of the right size."""

import os

import ml_dtypes
import numpy as np
import pytest

from jax_mxfp4.checkpoints import CheckpointError, stored_array
from jax_mxfp4.checkpoints.stored_array import StoredArray, aligned_empty

START = 37


def store(tmp_path, array, keep_cached=True, start=START):
    file = tmp_path / "file"
    file.write_bytes(b"x" * start + array.tobytes() + b"y" * 5)
    return StoredArray(file, "w", start, array.dtype, array.shape, keep_cached)


def random(shape, dtype=np.uint8):
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(0).integers(0, 256, nbytes, np.uint8).view(dtype).reshape(shape)


@pytest.fixture(params=["as it is", "small pieces"])
def pieces(request, monkeypatch):
    """Limits of which arrays of a few kilobytes need several pieces and threads, or none."""
    if request.param == "small pieces":
        monkeypatch.setattr(stored_array, "_CHUNK_BYTES", 100)
        monkeypatch.setattr(stored_array, "_READ_COST", 40)


PARTS = [
    (),
    (slice(None),),
    (slice(2, 5),),
    (slice(-2, None),),
    (slice(1, 2), slice(3, 9)),
    (slice(None), slice(8, 11)),
    (slice(None), slice(None), slice(1, 3)),
    (slice(3, 6), slice(5, 7), slice(0, 1), slice(2, 4)),
    (slice(None), slice(None), slice(None), slice(3, 4)),
    (slice(4, 4),),
    (slice(5, 2), slice(0, 3)),
    (slice(2, 1000), slice(-1000, 2)),
]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.float32], ids=str)
@pytest.mark.parametrize("part", PARTS, ids=str)
def test_any_part(tmp_path, part, dtype):
    array = random((6, 11, 3, 4), dtype)
    found = store(tmp_path, array).read(part)
    assert found.dtype == array.dtype
    assert found.shape == array[part].shape
    assert found.tobytes() == array[part].tobytes()
    assert found.size == 0 or found.ctypes.data % 64 == 0
    assert found.flags.c_contiguous and found.flags.writeable


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("shape", [(), (1,), (1000,), (0, 3), (3, 0), (1, 1, 700), (700, 1, 1)])
def test_any_shape(tmp_path, shape):
    array = random(shape)
    np.testing.assert_array_equal(store(tmp_path, array).read(), array, strict=True)


def reads_of(stored, part, monkeypatch):
    """The (offset in the array, size) of every read of `part`."""
    calls = []

    def record(descriptor, buffers, offset):
        calls.append((offset - START, len(buffers[0])))
        return preadv(descriptor, buffers, offset)

    preadv = os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", record)
        stored.read(part)
    return sorted(calls)


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_array, "_READ_COST", 100)
    stored = store(tmp_path, random((4, 50, 10)))
    assert reads_of(stored, (slice(1, 3),), monkeypatch) == [(500, 1000)]
    # Runs of 200 bytes are read each by itself, and so is a single row of each.
    part = (slice(None), slice(10, 30))
    assert reads_of(stored, part, monkeypatch) == [(500 * i + 100, 200) for i in range(4)]
    part = (slice(None), slice(10, 11))
    assert reads_of(stored, part, monkeypatch) == [(500 * i + 100, 10) for i in range(4)]
    # Runs of 2 bytes are not: 20 of them are read at once, with what is between them.
    part = (slice(2, 4), slice(10, 30), slice(4, 6))
    assert reads_of(stored, part, monkeypatch) == [(500 * i + 100, 200) for i in (2, 3)]
    part = (slice(2, 3), slice(10, 11), slice(4, 6))
    assert reads_of(stored, part, monkeypatch) == [(1104, 2)]
    # Nor are runs of 490 bytes with 10 between them.
    assert reads_of(stored, (slice(None), slice(1, 50)), monkeypatch) == [(0, 2000)]


def test_no_read_is_larger_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_array, "_CHUNK_BYTES", 64)
    stored = store(tmp_path, random((2, 30, 10)))
    whole = slice(None)
    for part in ((), (slice(0, 1),), (whole, slice(3, 9)), (whole, whole, slice(2))):
        for cost in (0, 10, 10_000):
            monkeypatch.setattr(stored_array, "_READ_COST", cost)
            assert max(size for _, size in reads_of(stored, part, monkeypatch)) <= 64


def test_what_is_no_part(tmp_path):
    stored = store(tmp_path, random((3, 4)))
    for part in ((slice(0, 3, 2),), (slice(None, None, -1),), (slice(0, 1),) * 3):
        with pytest.raises(ValueError, match="part: expected slices with step 1"):
            stored.read(part)


@pytest.mark.usefixtures("pieces")
def test_a_file_that_became_shorter(tmp_path):
    stored = store(tmp_path, random((50, 40)))
    os.truncate(stored.file, START + 1999)
    with pytest.raises(CheckpointError, match="file: tensor 'w': the file ends inside its data"):
        stored.read()
    assert stored.read((slice(0, 49),)).shape == (49, 40)
    stored.file.unlink()
    with pytest.raises(CheckpointError, match="tensor 'w': cannot be read: No such file"):
        stored.read()


def test_dropping_from_the_page_cache_changes_nothing_else(tmp_path):
    array = random((300, 4096))
    stored = store(tmp_path, array, keep_cached=False)
    np.testing.assert_array_equal(stored.read(), array, strict=True)
    np.testing.assert_array_equal(stored.read((slice(5, 7),)), array[5:7], strict=True)


@pytest.mark.parametrize("start", [37, 64, 4096, 4096 + 192])
@pytest.mark.parametrize("shape", [(7,), (3, 1400), (3000, 1440)])
def test_reading_past_the_page_cache(tmp_path, monkeypatch, start, shape):
    array, direct = random(shape), []
    stored = store(tmp_path, array, keep_cached=False, start=start)
    read = stored_array._read_blocks

    def counted(*args):
        direct.append(read(*args))
        return direct[-1]

    monkeypatch.setattr(stored_array, "_read_blocks", counted)
    np.testing.assert_array_equal(stored.read(), array, strict=True)
    if (descriptor := stored_array._open_direct(stored.file)) is None:
        pytest.skip("this file system has no O_DIRECT")
    os.close(descriptor)
    if start % 64 == 0 and array.nbytes > 2 * 4096:
        assert sum(direct) >= 0.99 * array.nbytes
    os.truncate(stored.file, start + array.nbytes - 1)
    with pytest.raises(CheckpointError, match="file: tensor 'w': the file ends inside its data"):
        stored.read()


def test_file_systems_without_direct_reads(tmp_path, monkeypatch):
    array = random((300, 4096))
    stored = store(tmp_path, array, keep_cached=False, start=4096)
    monkeypatch.setattr(stored_array, "_open_direct", lambda file: None)
    np.testing.assert_array_equal(stored.read(), array, strict=True)


def test_which_files_the_page_cache_can_keep():
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert stored_array.fits_page_cache(memory // 2)
    assert not stored_array.fits_page_cache(memory // 2 + 1)


def test_a_cpu_device_takes_over_what_is_aligned():
    import jax

    array = aligned_empty((300, 7), np.dtype(np.float32))
    array[...] = 1
    placed = jax.device_put(array, jax.devices("cpu")[0])
    assert placed.unsafe_buffer_pointer() == array.ctypes.data

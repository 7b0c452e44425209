"""How fast a checkpoint of the size of gpt-oss-20b loads, and how much memory that takes.

The checkpoint is synthetic, with the real names and shapes and random content, and is removed
afterwards. Its files are read in order, for the speed of the disk, and then loaded by a new
process; the page cache is told to drop them before each.

Memory is touched before it is loaded into. A virtual machine gets much of its memory from the host
only when it is first used, which can be slower than any disk and says nothing about the loader; how
fast it was is part of the result.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import ml_dtypes
import numpy as np
from results import Refused
from rich.table import Table

from jax_mxfp4.checkpoints import open_checkpoint
from jax_mxfp4.checkpoints.gpt_oss_layout import plan
from jax_mxfp4.checkpoints.safetensors_writer import NewTensor, SafetensorsWriter
from jax_mxfp4.convert import convert
from jax_mxfp4.models.gpt_oss import GptOss, GptOssConfig
from jax_mxfp4.models.gpt_oss.config_writing import hugging_face_json
from jax_mxfp4.models.gpt_oss.params import parameter_specs
from jax_mxfp4.models.gpt_oss.released import released_config

LAYOUTS = ("huggingface", "openai", "gguf")
GPT_OSS_20B = released_config("20b")
_CHUNK_BYTES = 2**26
_READ_BYTES = 2**24

Say = Callable[[str], None]


def measure_load(layout: str, layers: int, folder: Path, samples: int, say: Say) -> dict[str, Any]:
    """Measure one layout; returns a row of the results.

    Args:
      layout: one of `LAYOUTS`.
      layers: how many; gpt-oss-20b has 24.
      folder: where to write the checkpoint; it lies in a new folder there, which is removed.
      samples: how often the files are read, and loaded, in turn.
      say: reports progress.

    Raises:
      Refused: there is too little room on the file system, or in memory.
    """
    config = _with_layers(layers)
    with temporary_folder(folder) as scratch:
        path = _write(config, layout, scratch, say)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        nbytes = sum(file.stat().st_size for file in files)
        reads, loads = [], []
        for _ in range(samples):
            reads.append(read_seconds(files))
            say(f"read {nbytes / reads[-1] / 1e9:.2f} GB/s")
            drop_from_cache(files)
            require_memory(nbytes)
            loads.append(load(path))
            say(f"loaded {nbytes / loads[-1]['seconds'] / 1e9:.2f} GB/s")
        largest = max(info.nbytes for info in open_checkpoint(path).tensors.values())
    read_gbs = nbytes / median(reads) / 1e9
    load_gbs = nbytes / median(one["seconds"] for one in loads) / 1e9
    peak = max(loads, key=lambda one: one["peak_rss_bytes"])
    return {
        "op": "load",
        "layout": layout,
        "layers": layers,
        "file_bytes": nbytes,
        "read_gbs": round(read_gbs, 3),
        "load_gbs": round(load_gbs, 3),
        "fraction": round(load_gbs / read_gbs, 3),
        "memory_gbs": [one["memory_gbs"] for one in loads],
        "read_seconds": [round(seconds, 2) for seconds in reads],
        "load_seconds": [round(one["seconds"], 2) for one in loads],
        "host_array_bytes": peak["host_array_bytes"],
        "peak_rss_bytes": peak["peak_rss_bytes"],
        "rss_before_bytes": peak["rss_before_bytes"],
        "beyond_arrays_bytes": peak["peak_rss_bytes"] - peak["host_array_bytes"],
        "largest_tensor_bytes": largest,
        "bound_bytes": largest + 2**30,
    }


def load_table(results: dict[str, Any]) -> Table:
    """The rows of a result; the title names device and commit."""
    out = Table(title=f"{results['device']}, commit {results['commit'][:12]}, {results['date']}")
    out.add_column("layout")
    headings = ("GB", "read GB/s", "load GB/s", "of read", "s", "peak RSS GB", "beyond arrays GB")
    for heading in (*headings, "bound GB"):
        out.add_column(heading, justify="right")
    for row in results["rows"]:
        out.add_row(
            row["layout"],
            f"{row['file_bytes'] / 1e9:.2f}",
            f"{row['read_gbs']:.2f}",
            f"{row['load_gbs']:.2f}",
            f"{row['fraction']:.0%}",
            f"{median(row['load_seconds']):.1f}",
            *(
                f"{row[key] / 1e9:.2f}"
                for key in ("peak_rss_bytes", "beyond_arrays_bytes", "bound_bytes")
            ),
        )
    return out


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, which vanishes also when the process is told to end."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with tempfile.TemporaryDirectory(prefix="load-", dir=parent) as scratch:
            yield Path(scratch)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_memory(nbytes: int) -> None:
    """Refuse to load so much where that would end other processes.

    Raises:
      Refused: too little of the host's memory is available.
    """
    needed = nbytes + 2**31 if jax.default_backend() == "cpu" else 2**32
    if (available := _proc_bytes("meminfo", "MemAvailable")) < needed:
        raise Refused(f"loading needs {needed:,} bytes of memory, found {available:,}")


def read_seconds(files: list[Path]) -> float:
    """How long it takes to read `files` in order and from disk, through one buffer."""
    drop_from_cache(files)
    buffer = bytearray(_READ_BYTES)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - start


def drop_from_cache(files: list[Path]) -> None:
    """Have the kernel forget what it keeps of `files`, which must be on disk first."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint in a new process; returns what `_load_here` prints."""
    done = subprocess.run(
        [sys.executable, __file__, str(path)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def _with_layers(layers: int) -> GptOssConfig:
    kinds = GPT_OSS_20B.layer_types
    return replace(GPT_OSS_20B, layer_types=(kinds * math.ceil(layers / len(kinds)))[:layers])


def _write(config: GptOssConfig, layout: str, scratch: Path, say: Say) -> Path:
    tensors = {
        tensor.name: NewTensor("U8" if "U8" in tensor.dtypes else "BF16", tensor.shape)
        for source in plan("huggingface", parameter_specs(config)).values()
        for tensor in source.tensors
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    needed = round(nbytes * (1 if layout == "huggingface" else 2) * 1.02)
    if (free := shutil.disk_usage(scratch).free) < needed:
        raise Refused(f"{scratch} needs {needed:,} free bytes, found {free:,}")
    say(f"writing {nbytes / 1e9:.1f} GB")
    folder = scratch / "huggingface"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hugging_face_json(config)))
    generator = np.random.Generator(np.random.SFC64(0))
    with SafetensorsWriter(folder, tensors) as writer:
        for name, tensor in tensors.items():
            rows = max(1, _CHUNK_BYTES * tensor.shape[0] // tensor.nbytes)
            for first in range(0, tensor.shape[0], rows):
                shape = (min(rows, tensor.shape[0] - first), *tensor.shape[1:])
                writer.write(name, _content(name, shape, tensor.dtype, generator), first)
    if layout == "huggingface":
        return folder
    say(f"converting to {layout}")
    path = scratch / ("checkpoint.gguf" if layout == "gguf" else layout)
    convert(folder, path, "gguf" if layout == "gguf" else "openai")
    shutil.rmtree(folder)
    return path


def _content(
    name: str, shape: tuple[int, ...], dtype: str, generator: np.random.Generator
) -> np.ndarray:
    """Random codes; scales from 2^-15 to 1; bfloat16 of magnitudes from 2^-7 to 1."""
    if dtype == "BF16":
        bits = np.frombuffer(generator.bytes(2 * math.prod(shape)), np.uint16)
        exponent = np.uint16(120 << 7) + (bits & np.uint16(0x0380))
        return (bits & np.uint16(0x807F) | exponent).view(ml_dtypes.bfloat16).reshape(shape)
    content = np.frombuffer(generator.bytes(math.prod(shape)), np.uint8)
    if name.endswith("scales"):
        content = np.uint8(112) + (content & np.uint8(15))
    return content.reshape(shape)


def _load_here(path: Path) -> dict[str, Any]:
    """Load a checkpoint and return how long it took and what the process needed for it."""
    jax.block_until_ready(jax.device_put(np.zeros(1)))  # starts the backend
    memory_gbs = _touch_memory(sum(info.nbytes for info in open_checkpoint(path).tensors.values()))
    before = _proc_bytes("self/status", "VmRSS")
    start = time.perf_counter()
    model = jax.block_until_ready(GptOss.from_pretrained(path))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "memory_gbs": memory_gbs,
        "rss_before_bytes": before,
        # Unlike what `getrusage` says, not that of the process that this one came from.
        "peak_rss_bytes": _proc_bytes("self/status", "VmHWM"),
        "host_array_bytes": sum(
            leaf.nbytes
            for leaf in jax.tree.leaves(model)
            if all(device.platform == "cpu" for device in leaf.devices())
        ),
    }


def _touch_memory(nbytes: int) -> float:
    """Have the machine find so much memory, and return how fast that was in 10^9 bytes a second.

    Another process does it, which does not count as memory of this one.
    """
    program = (
        "import sys, time, numpy as np; start = time.perf_counter(); "
        "np.empty(int(sys.argv[1]), np.uint8)[::4096] = 1; print(time.perf_counter() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(nbytes)], stdout=subprocess.PIPE, text=True, check=True
    )
    return round(nbytes / float(done.stdout) / 1e9, 2)


def _proc_bytes(file: str, field: str) -> int:
    """A size in bytes from a file below /proc."""
    for line in Path("/proc", file).read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{file}: no {field}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What run.py starts to load a checkpoint.")
    parser.add_argument("path", type=Path)
    json.dump(_load_here(parser.parse_args().path), sys.stdout)

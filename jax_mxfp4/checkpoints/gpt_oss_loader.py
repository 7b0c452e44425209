"""Reading the parameters of a GPT-OSS checkpoint, one at a time."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.gguf_parameters import read_gguf
from jax_mxfp4.checkpoints.gpt_oss_layout import (
    ParameterSpec,
    Source,
    check,
    detect_layout,
    plan,
)
from jax_mxfp4.checkpoints.reader import Reader

Progress = Callable[[str, int, int], None]


def read_parameters(
    reader: Reader, specs: Mapping[str, ParameterSpec], progress: Progress | None = None
) -> Iterator[tuple[str, np.ndarray | MXFP4Array]]:
    """Yield every parameter of `specs` with its canonical name, in the order of `specs`.

    All tensors are checked before the first is read. Packed parameters keep their stored bytes; at
    no time is more than one parameter in memory on behalf of this function.

    Args:
      reader: an open checkpoint in any layout of `gpt_oss_layout`.
      specs: canonical name -> what the model needs; see `gpt_oss_layout`.
      progress: called after each parameter with (canonical name, bytes read so far, bytes of all).

    Yields:
      (name, array): dense parameters as NumPy arrays in their stored element type (Q8_0 as
      float32), packed ones as `MXFP4Array` of NumPy arrays.

    Raises:
      CheckpointError: the layout is unknown, or tensors are missing, unexpected, misshapen or of
        the wrong element type; every one of them is listed.
    """
    layout = detect_layout(reader)
    sources = plan(layout, specs)
    check(reader, sources)
    read = read_gguf if layout == "gguf" else _read_safetensors
    total = sum(info.nbytes for info in reader.tensors.values())
    done = 0
    for name, source in sources.items():
        array = read(reader, source, specs[name])
        yield name, array
        if progress is not None:
            done += _stored_bytes(reader, source, specs[name])
            progress(name, done, total)


def _read_safetensors(
    reader: Reader, source: Source, spec: ParameterSpec
) -> np.ndarray | MXFP4Array:
    arrays = [reader.read(tensor.name, source.rows) for tensor in source.tensors]
    return MXFP4Array(*arrays) if spec.packed else arrays[0]


def _stored_bytes(reader: Reader, source: Source, spec: ParameterSpec) -> int:
    """Return how many bytes of the files are the parameter's."""
    nbytes = sum(reader.tensors[tensor.name].nbytes for tensor in source.tensors)
    return nbytes if source.rows is None else nbytes * spec.shape[0] // source.tensors[0].shape[0]

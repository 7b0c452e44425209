"""Reading the parameters of a GPT-OSS checkpoint, one at a time."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.gguf_parameters import read_gguf
from jax_mxfp4.checkpoints.gpt_oss_layout import (
    Layout,
    ParameterSpec,
    Source,
    check,
    detect_layout,
    plan,
)
from jax_mxfp4.checkpoints.reader import Reader, read_part
from jax_mxfp4.checkpoints.stored_array import Part, box

Progress = Callable[[str, int, int], None]


class GptOssParameters:
    """The parameters of a GPT-OSS checkpoint in any layout of `gpt_oss_layout`.

    All tensors are checked here, before the first is read.

    Attributes:
      specs: canonical name -> what the model needs.

    Raises:
      CheckpointError: the layout is unknown, or tensors are missing, unexpected, misshapen, of the
        wrong element type or there twice; every one of them is listed.
    """

    def __init__(self, reader: Reader, specs: Mapping[str, ParameterSpec]) -> None:
        """Find the parameters `specs` in the open checkpoint `reader`."""
        self.specs = specs
        self._reader = reader
        layout = detect_layout(reader)
        self._sources = self._plan(layout)
        check(reader, self._sources)
        self._read = read_gguf if layout == "gguf" else _read_safetensors

    def _plan(self, layout: Layout) -> dict[str, Source]:
        return plan(layout, self.specs)

    def read(self, name: str, part: Part = ()) -> np.ndarray | MXFP4Array:
        """Return parameter `name`, or a part of its `ParameterSpec.part_shape`.

        Returns:
          A dense parameter as NumPy array in its stored element type (Q8_0 as float32), a packed
          one as `MXFP4Array` of NumPy arrays with its stored bytes.

        Raises:
          CheckpointError: a file cannot be read, or has become shorter.
        """
        return self._read(self._reader, self._sources[name], self.specs[name], part)

    def stored_bytes(self, name: str) -> int:
        """Return how many bytes of the files are those of parameter `name`."""
        source = self._sources[name]
        nbytes = sum(self._reader.tensors[tensor.name].nbytes for tensor in source.tensors)
        if source.rows is None:
            return nbytes
        return nbytes * self.specs[name].shape[0] // source.tensors[0].shape[0]


def read_parameters(
    reader: Reader, specs: Mapping[str, ParameterSpec], progress: Progress | None = None
) -> Iterator[tuple[str, np.ndarray | MXFP4Array]]:
    """Yield every parameter of `specs` with its canonical name, in the order of `specs`.

    At no time is more than one parameter in memory on behalf of this function.

    Args:
      reader: an open checkpoint in any layout of `gpt_oss_layout`.
      specs: canonical name -> what the model needs; see `gpt_oss_layout`.
      progress: called after each parameter with (canonical name, bytes read so far, bytes of all).

    Yields:
      (name, array), as `GptOssParameters.read` returns it.

    Raises:
      CheckpointError: see `GptOssParameters`.
    """
    parameters = GptOssParameters(reader, specs)
    total = sum(map(parameters.stored_bytes, specs))
    done = 0
    for name in specs:
        yield name, parameters.read(name)
        if progress is not None:
            done += parameters.stored_bytes(name)
            progress(name, done, total)


def _read_safetensors(
    reader: Reader, source: Source, spec: ParameterSpec, part: Part
) -> np.ndarray | MXFP4Array:
    if source.rows is not None:
        rows, *others = box(part, spec.part_shape)
        start = source.rows.start
        part = (slice(start + rows.start, start + rows.stop), *others)
    arrays = [read_part(reader, tensor.name, part) for tensor in source.tensors]
    return MXFP4Array(arrays[0], arrays[1]) if spec.packed else arrays[0]

"""Reading the parameters of a GPT-OSS checkpoint, one at a time."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.gpt_oss_layout import ParameterSpec, check, detect_layout, plan
from jax_mxfp4.checkpoints.reader import Reader

Progress = Callable[[str, int, int], None]


def read_parameters(
    reader: Reader, specs: Mapping[str, ParameterSpec], progress: Progress | None = None
) -> Iterator[tuple[str, np.ndarray | MXFP4Array]]:
    """Yield every parameter of `specs` with its canonical name, in the order of `specs`.

    All tensors are checked before the first is read. Packed parameters keep their stored bytes; at
    no time is more than one parameter in memory on behalf of this function.

    Args:
      reader: an open checkpoint in Hugging Face's or OpenAI's layout.
      specs: canonical name -> what the model needs; see `gpt_oss_layout`.
      progress: called after each parameter with (canonical name, bytes read so far, bytes of all).

    Yields:
      (name, array): dense parameters as NumPy arrays in their stored element type, packed ones as
      `MXFP4Array` of NumPy arrays.

    Raises:
      CheckpointError: the layout is unknown, or tensors are missing, unexpected, misshapen or of
        the wrong element type; every one of them is listed.
    """
    sources = plan(detect_layout(reader), specs)
    check(reader, sources)
    total = sum(info.nbytes for info in reader.tensors.values())
    done = 0
    for name, source in sources.items():
        arrays = [reader.read(tensor.name, source.rows) for tensor in source.tensors]
        done += sum(array.nbytes for array in arrays)
        yield name, MXFP4Array(*arrays) if specs[name].packed else arrays[0]
        if progress is not None:
            progress(name, done, total)

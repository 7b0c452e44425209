"""The weights of any model in a Hugging Face folder by their names, packed ones as `MXFP4Array`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.compressed_tensors import FOREIGN, PACKED, SCALE, require_mxfp4
from jax_mxfp4.checkpoints.errors import CheckpointError
from jax_mxfp4.checkpoints.gpt_oss_layout import ParameterSpec
from jax_mxfp4.checkpoints.gpt_oss_loader import Progress
from jax_mxfp4.checkpoints.reader import TensorInfo, read_json_object
from jax_mxfp4.checkpoints.safetensors_folder import SafetensorsFolder
from jax_mxfp4.checkpoints.stored_array import Part, box
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE


class WeightsFolder:
    """A folder of `config.json` and safetensors files in Hugging Face's layout.

    The model may be any, such as Llama, with weights as they are or packed by compressed-tensors
    in the format `mxfp4-pack-quantized`. Either way `X.weight` is the name of the weight of X:

        weights = WeightsFolder("path/to/llama-mxfp4")
        weights.specs["model.layers.0.mlp.up_proj.weight"]  # ParameterSpec((N, K), packed=True)
        weights.read("model.layers.0.mlp.up_proj.weight")  # MXFP4Array of NumPy arrays
        for name, weight in weights.items(): ...  # all of them, one at a time
        for name, weight in place_parameters(weights): ...  # the same, onto devices

    Opening reads the configuration and headers only. Packed weights are never decoded.

    Attributes:
      path: the folder.
      config: the content of `config.json`.
      specs: shape of every weight by name, and whether it is packed. Other tensors, such as
        biases, are weights here too.
      problems: tensors that are there twice, or elsewhere than the index says; empty if strict.

    Raises:
      CheckpointError: the folder or its configuration is damaged, the weights are quantized in
        another format, or (all listed at once) tensors of packed weights do not fit together, or
        are there twice.
    """

    def __init__(self, path: str | Path, *, strict: bool = True) -> None:
        """Open the folder `path`.

        Args:
          path: the folder.
          strict: whether `problems` are an error by themselves. If not, they are for the caller to
            report with what else does not fit a model.
        """
        # They are reported here, with what is wrong with packed weights.
        self._reader = SafetensorsFolder(path, strict=False)
        self.problems: Sequence[str] = self._reader.problems
        self.path = self._reader.path
        file = self.path / "config.json"
        self.config: Mapping[str, Any] = read_json_object(file)
        self.specs: dict[str, ParameterSpec] = {}
        self._stored: dict[str, tuple[TensorInfo, ...]] = {}
        quantization = self.config.get("quantization_config")
        if quantization is not None:
            require_mxfp4(file, quantization)
        problems = self._add(self._reader.tensors)
        if any(spec.packed for spec in self.specs.values()) != (quantization is not None):
            problems.append(
                f"expected *.{PACKED} tensors if and only if config.json has 'quantization_config'"
            )
        if problems or (strict and self.problems):
            raise CheckpointError(self.path, [*problems, *self.problems])

    def _add(self, tensors: Mapping[str, TensorInfo]) -> list[str]:
        """Add the weights that `tensors` make up; return what is wrong with them."""
        problems = []
        for name, info in tensors.items():
            stem, _, part = name.rpartition(".")
            weight = f"{stem}.weight"
            if part == SCALE and f"{stem}.{PACKED}" in tensors:
                continue  # comes with its partner
            if part == PACKED:
                scale = tensors.get(f"{stem}.{SCALE}")
                if weight in tensors:
                    problems.append(f"{_describe(info)}: {weight!r} is there as well")
                if problem := _mismatch(info, scale):
                    problems.append(problem)
                elif scale is not None:
                    shape = (info.shape[0], info.shape[1] * 2)
                    self.specs[weight] = ParameterSpec(shape, packed=True)
                    self._stored[weight] = (info, scale)
            elif part == SCALE or part in FOREIGN:
                problems.append(f"{_describe(info)}: unexpected, found {_found(info)}")
            else:
                self.specs[name] = ParameterSpec(info.shape)
                self._stored[name] = (info,)
        return problems

    def read(self, name: str, part: Part = ()) -> np.ndarray | MXFP4Array:
        """Return weight `name`, or a part of its `ParameterSpec.part_shape`.

        Args:
          name: a key of `specs`.
          part: slices of the first axes; of a packed weight the last axis is counted in blocks.

        Returns:
          `MXFP4Array` of NumPy arrays for a packed weight, else an array in its stored element
          type.

        Raises:
          CheckpointError: NumPy has no such element type; or a file cannot be read, or has become
            shorter.
          ValueError: `part` is no part of the weight.
        """
        stored = [self._reader.stored(info.name) for info in self._stored[name]]
        if not self.specs[name].packed:
            return stored[0].read(part)
        rows, groups = box(part, self.specs[name].part_shape)
        columns = slice(groups.start * BLOCK_BYTES, groups.stop * BLOCK_BYTES)
        scales = stored[1].read((rows, groups))
        blocks = stored[0].read((rows, columns)).reshape(*scales.shape, BLOCK_BYTES)
        return MXFP4Array(blocks, scales)

    def stored_bytes(self, name: str) -> int:
        """Return the size of weight `name` in its file."""
        return sum(info.nbytes for info in self._stored[name])

    def items(
        self, progress: Progress | None = None
    ) -> Iterator[tuple[str, np.ndarray | MXFP4Array]]:
        """Yield every weight with its name; one at a time is in memory.

        Args:
          progress: called after each weight with (name, bytes read so far, bytes of all).
        """
        total = sum(map(self.stored_bytes, self.specs))
        done = 0
        for name in self.specs:
            yield name, self.read(name)
            if progress is not None:
                done += self.stored_bytes(name)
                progress(name, done, total)


def _mismatch(packed: TensorInfo, scale: TensorInfo | None) -> str | None:
    """Return what is wrong with the two tensors of a packed weight."""
    if packed.dtype != "U8" or len(packed.shape) != 2 or packed.shape[1] % BLOCK_BYTES:
        expected = f"U8 [N, K / 2] with K a multiple of {BLOCK_SIZE}"
        return f"{_describe(packed)}: expected {expected}, found {_found(packed)}"
    rows, columns = packed.shape
    shape = (rows, columns // BLOCK_BYTES)
    expected = f"expected {SCALE!r} U8 {list(shape)} beside it"
    if scale is None:
        return f"{_describe(packed)}: {expected}, found none"
    if (scale.dtype, scale.shape) != ("U8", shape):
        return f"{_describe(packed)}: {expected}, found {_found(scale)}"
    return None


def _describe(info: TensorInfo) -> str:
    return f"{info.file.name}: tensor {info.name!r}"


def _found(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"

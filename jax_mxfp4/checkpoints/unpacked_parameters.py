"""Parameters of a GPT-OSS checkpoint whose experts are not packed, as they are."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints.gpt_oss_layout import Layout, ParameterSpec, Source, plan
from jax_mxfp4.checkpoints.gpt_oss_loader import GptOssParameters
from jax_mxfp4.checkpoints.packing_reader import UnpackedExperts, unpacked_experts
from jax_mxfp4.checkpoints.reader import Reader, read_part
from jax_mxfp4.checkpoints.stored_array import Part, box


class UnpackedParameters(GptOssParameters):
    """`GptOssParameters` with experts in bfloat16, float16 or float32, outputs first: [E, N, K].

    `PackingReader` packs them; here they keep their values.

    Raises:
      CheckpointError: as `GptOssParameters`.
    """

    def __init__(self, reader: Reader, specs: Mapping[str, ParameterSpec]) -> None:
        """Find the parameters `specs` in `reader`, those that are to be packed without that."""
        self._experts = unpacked_experts(reader, specs)
        self._packed_specs = specs
        super().__init__(reader, {name: ParameterSpec(spec.shape) for name, spec in specs.items()})

    def _plan(self, layout: Layout) -> dict[str, Source]:
        sources = plan(layout, self._packed_specs)
        for name, stored in self._experts.items():
            sources[name] = replace(sources[name], tensors=tuple(one.stored for one in stored))
        return sources

    def read(self, name: str, part: Part = ()) -> np.ndarray | MXFP4Array:
        """Return parameter `name`, or a part of its `ParameterSpec.part_shape`."""
        stored: tuple[UnpackedExperts, ...] = self._experts.get(name, ())
        if not any(one.is_transposed for one in stored):
            return super().read(name, part)
        experts, rows, columns = box(part, self.specs[name].shape)
        return read_part(self._reader, stored[0].stored.name, (experts, columns, rows)).swapaxes(
            1, 2
        )

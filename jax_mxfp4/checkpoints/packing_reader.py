"""A GPT-OSS checkpoint whose experts are not packed, read as if they were.

Beside the released layouts there are checkpoints of GPT-OSS in bfloat16 and wider types. Their
experts lie

* in Hugging Face's layout as `...experts.gate_up_proj` [E, D, 2I] and `...experts.down_proj`
  [E, I, D]: inputs first, so each expert is the transpose of the packed [2I, D] and [D, I]; gate
  and up alternate in the same way (transformers `GptOssExperts`, `convert_moe_packed_tensors`);
* in OpenAI's as `...mlp1_weight` and `...mlp2_weight`, outputs first;
* in GGUF files under the same names as when packed, with another element type.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.block_layouts import canonical
from jax_mxfp4.checkpoints.gguf_blocks import pack_mxfp4
from jax_mxfp4.checkpoints.gpt_oss_layout import (
    Layout,
    ParameterSpec,
    StoredTensor,
    check,
    detect_layout,
    plan,
)
from jax_mxfp4.checkpoints.reader import Reader, TensorInfo
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE

Packer = Callable[[str, np.ndarray], MXFP4Array]
"""Packs one matrix: (name, float32, bfloat16 or float16 [N, K]) -> `MXFP4Array` [N, K]."""

_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class UnpackedExperts:
    """One stored tensor of experts.

    Attributes:
      stored: what it must be.
      is_transposed: whether each expert is [K, N].
      parts: what it would be if it were packed: blocks and scales, or one tensor in a GGUF file.
    """

    stored: StoredTensor
    is_transposed: bool
    parts: tuple[StoredTensor, ...]


class PackingReader:
    """A `Reader` over another one that packs experts as they are read.

    Experts are packed one by one, under the stored name of their tensor and their number, as
    "model.layers.0.mlp.experts.down_proj.7".

    Raises:
      CheckpointError: lists every tensor that is missing, unexpected, misshapen, wrongly typed or
        there twice.
    """

    def __init__(self, reader: Reader, specs: Mapping[str, ParameterSpec], pack: Packer) -> None:
        """Present `reader`, a checkpoint of `specs` without packed experts, as packed by `pack`."""
        self._reader = reader
        self._pack = pack
        sources = plan(detect_layout(reader), specs)
        experts = unpacked_experts(reader, specs)
        for name, ones in experts.items():
            sources[name] = replace(sources[name], tensors=tuple(one.stored for one in ones))
        check(reader, sources)
        self._tensors = dict(reader.tensors)
        self._experts: dict[str, UnpackedExperts] = {}
        for one in (one for ones in experts.values() for one in ones):
            info = self._tensors.pop(one.stored.name)
            for part in one.parts:
                self._experts[part.name] = one
                self._tensors[part.name] = replace(
                    info,
                    name=part.name,
                    dtype=part.dtypes[0],
                    shape=part.shape,
                    nbytes=info.nbytes // len(one.parts),
                )
        # GGUF files are read by several threads, which a `Packer` need not be ready for.
        self._packing = Lock()
        # What was packed last, and of which rows, until all of its parts have been read.
        self._waiting: tuple[UnpackedExperts, slice | None, MXFP4Array] | None = None

    @property
    def path(self) -> Path:
        """The folder or file of the checkpoint."""
        return self._reader.path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, experts as if packed; `nbytes` is what will be read for it."""
        return self._tensors

    @property
    def problems(self) -> Sequence[str]:
        """None, or this would not have been made."""
        return self._reader.problems

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Return tensor `name`, or only `rows` of its first axis, packing it if it is of experts.

        Scales cost nothing when they are read right after the blocks of the same rows.
        """
        one = self._experts.get(name)
        if one is None:
            return self._reader.read(name, rows)
        if len(one.parts) == 1:
            packed = self._packed(one, rows)
            return pack_mxfp4(packed.blocks, packed.scales)
        if self._waiting is None or self._waiting[:2] != (one, rows):
            self._waiting = (one, rows, self._packed(one, rows))
        packed = self._waiting[2]
        if name == one.parts[0].name:
            return packed.blocks
        self._waiting = None
        return packed.scales

    def _packed(self, one: UnpackedExperts, rows: slice | None) -> MXFP4Array:
        name = one.stored.name
        count, contracted, out = one.stored.shape
        if not one.is_transposed:
            contracted, out = out, contracted
        experts = range(count)[rows or slice(None)]
        scales = np.empty((len(experts), out, contracted // BLOCK_SIZE), np.uint8)
        blocks = np.empty((*scales.shape, BLOCK_BYTES), np.uint8)
        for place, expert in enumerate(experts):
            matrix = self._reader.read(name, slice(expert, expert + 1))[0]
            if one.is_transposed:
                matrix = np.ascontiguousarray(matrix.T)
            with self._packing:
                packed = canonical(self._pack(f"{name}.{expert}", matrix))
            blocks[place], scales[place] = packed.blocks, packed.scales
        return MXFP4Array(blocks, scales)


def has_unpacked_experts(reader: Reader, specs: Mapping[str, ParameterSpec]) -> bool:
    """Whether `reader` has any tensor of experts that is not packed.

    Raises:
      CheckpointError: the layout is unknown.
    """
    return any(
        one.stored.name in reader.tensors and reader.tensors[one.stored.name].dtype in _FLOATS
        for ones in unpacked_experts(reader, specs).values()
        for one in ones
    )


def unpacked_experts(
    reader: Reader, specs: Mapping[str, ParameterSpec]
) -> dict[str, tuple[UnpackedExperts, ...]]:
    """Return how the packed parameters of `specs` lie in `reader` if they are not packed."""
    layout = detect_layout(reader)
    return {
        name: _unpacked(layout, source.tensors)
        for name, source in plan(layout, specs).items()
        if specs[name].packed
    }


def _unpacked(layout: Layout, parts: tuple[StoredTensor, ...]) -> tuple[UnpackedExperts, ...]:
    if layout == "gguf":
        return tuple(
            UnpackedExperts(replace(part, dtypes=_FLOATS), False, (part,)) for part in parts
        )
    blocks, scales = parts
    experts, out, groups = scales.shape
    shape = (experts, out, groups * BLOCK_SIZE)
    is_transposed = layout == "huggingface"
    if is_transposed:
        shape = (experts, groups * BLOCK_SIZE, out)
    # Without `_blocks` or `.blocks`.
    stored = StoredTensor(blocks.name[: -len("_blocks")], shape, _FLOATS)
    return (UnpackedExperts(stored, is_transposed, parts),)

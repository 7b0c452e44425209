"""Element types across conversions: a GGUF file widens tensors, and remembers what they were."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jax_mxfp4.checkpoints.errors import CheckpointError, shorten
from jax_mxfp4.checkpoints.gguf_file import GgufFile
from jax_mxfp4.checkpoints.gpt_oss_layout import ParameterSpec, check, detect_layout, plan
from jax_mxfp4.checkpoints.reader import Reader, parse_json_object

ORIGINAL_DTYPES = "jax_mxfp4.dtypes"
"""Metadata key: a JSON object, canonical name -> element type before the file was written."""

_NUMPY = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


def dense_dtypes(reader: Reader, specs: Mapping[str, ParameterSpec]) -> dict[str, str]:
    """Return the element type of each parameter that is not packed, before any widening.

    Raises:
      CheckpointError: as `read_parameters`, or the record in a GGUF file is damaged.
    """
    layout = detect_layout(reader)
    sources = plan(layout, specs)
    check(reader, sources)
    recorded = {}
    if isinstance(reader, GgufFile):
        text = reader.metadata.get(ORIGINAL_DTYPES, "{}")
        recorded = parse_json_object(reader.path, text, f"metadata key {ORIGINAL_DTYPES!r}")
    found = {}
    problems = []
    for name, source in sources.items():
        if specs[name].packed:
            continue
        stored = {reader.tensors[tensor.name].dtype for tensor in source.tensors}
        dtype = stored.pop() if len(stored) == 1 else "F32"
        found[name] = "F32" if dtype == "Q8_0" else dtype
        if name in recorded:
            original = recorded[name]
            if found[name] != "F32" or original not in tuple(_NUMPY):
                problems.append(
                    f"metadata key {ORIGINAL_DTYPES!r}: expected a type that widens to F32 for "
                    f"{name!r} ({found[name]}), found {shorten(original)}"
                )
            found[name] = original
    if problems:
        raise CheckpointError(reader.path, problems)
    return found


def widen(array: np.ndarray) -> np.ndarray:
    """Return bfloat16, float16 or float32 as float32, bit for bit for the first."""
    if array.dtype != ml_dtypes.bfloat16:
        return array.astype(np.float32)
    # Shifted, not converted: a conversion may change NaN payloads.
    return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(array: np.ndarray, dtype: str, reader: Reader, name: str) -> np.ndarray:
    """Return parameter `name` of `reader` in `dtype`, which must hold all its values exactly.

    Raises:
      CheckpointError: it does not; the tensors were changed after `dtype` was recorded.
    """
    target = _NUMPY[dtype]
    if array.dtype == target:
        return array
    if target == ml_dtypes.bfloat16:
        upper = np.ascontiguousarray(array).view(np.uint32) >> np.uint32(16)
        narrowed = upper.astype(np.uint16).view(target)
    else:
        narrowed = array.astype(target)
    if not np.array_equal(widen(narrowed), array, equal_nan=True):
        raise CheckpointError(
            reader.path, f"{name!r} is recorded as {dtype}, but its values do not fit in that"
        )
    return narrowed

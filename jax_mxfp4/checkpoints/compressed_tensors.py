"""The format `mxfp4-pack-quantized` of compressed-tensors: its names and its configuration.

In place of `X.weight` [N, K] a packed linear layer X has two tensors:

* `X.weight_packed`, uint8 [N, K / 2]: byte j of a row holds element 2j in its low four bits and
  element 2j + 1 in its high ones;
* `X.weight_scale`, uint8 [N, K / 32]: E8M0 bytes with bias 127.

These are the bytes of `MXFP4Array`, whose blocks are [N, K / 32, 16]. Sources: compressed-tensors
0.20 (`MXFP4PackedCompressor`, `pack_fp4_to_uint8`, `compress_mx_scale`, `QuantizationConfig`) and
vLLM (`CompressedTensorsW4A16Mxfp4`, `should_ignore_layer`).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jax_mxfp4.checkpoints.errors import CheckpointError, shorten
from jax_mxfp4.format import BLOCK_SIZE

METHOD = "compressed-tensors"
FORMAT = "mxfp4-pack-quantized"

PACKED, SCALE = "weight_packed", "weight_scale"

FOREIGN = ("weight_zero_point", "weight_global_scale", "weight_g_idx", "weight_shape")
"""Tensors of other formats of compressed-tensors, without which their weights mean nothing."""

# What the weights of a group must be, and whether a missing key means just that.
_WEIGHTS = {
    "num_bits": (4, False),
    "type": ("float", False),
    "group_size": (BLOCK_SIZE, False),
    "strategy": ("group", True),
    "symmetric": (True, True),
    "dynamic": (False, True),
    "actorder": (None, True),
}


def quantization_config(targets: Iterable[str], ignore: Iterable[str]) -> dict[str, Any]:
    """Return the entry `quantization_config` of config.json for packed weights.

    Args:
      targets: what is packed: class names such as "Linear", or names of modules.
      ignore: modules of such a class that are not packed.
    """
    weights = {key: value for key, (value, _) in _WEIGHTS.items() if value is not None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": list(targets),
                "format": FORMAT,
                "weights": {**weights, "scale_dtype": "torch.uint8"},
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def require_mxfp4(file: Path, quantization: object) -> None:
    """Refuse a `quantization_config` that does not describe MXFP4 weights alone.

    What it says of activations and of the key-value cache is not looked at: the weights are the
    same.

    Args:
      file: the config.json, for messages.
      quantization: the value of its key `quantization_config`.

    Raises:
      CheckpointError: lists everything that is of another format.
    """
    where = "quantization_config"
    if not isinstance(quantization, Mapping):
        raise CheckpointError(file, f"'{where}': expected an object, found {shorten(quantization)}")
    problems = []

    def expect(key: str, found: object, expected: object) -> None:
        # type() as well: 1 == True in Python.
        if type(found) is not type(expected) or found != expected:
            problems.append(f"'{where}.{key}': expected {expected!r}, found {shorten(found)}")

    expect("quant_method", quantization.get("quant_method"), METHOD)
    if not problems:  # the keys below have a meaning
        groups = quantization.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            problems.append(f"'{where}.config_groups': expected groups, found {shorten(groups)}")
            groups = {}
        for name, group in groups.items():
            key = f"config_groups.{name}"
            if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
                problems.append(f"'{where}.{key}': expected an object with 'weights'")
                continue
            expect(f"{key}.format", group.get("format") or quantization.get("format"), FORMAT)
            for setting, (value, is_default) in _WEIGHTS.items():
                found = group["weights"].get(setting)
                if found is not None or not is_default:
                    expect(f"{key}.weights.{setting}", found, value)
        sparsity = quantization.get("sparsity_config")
        if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense"):
            problems.append(f"'{where}.sparsity_config': not supported, found {shorten(sparsity)}")
        # Rotated weights give the right product with activations only that are rotated as well.
        if found := quantization.get("transform_config"):
            problems.append(f"'{where}.transform_config': not supported, found {shorten(found)}")
    if problems:
        raise CheckpointError(file, problems)

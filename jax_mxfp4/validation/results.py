"""What a result was measured on and how, and its JSON file."""

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jax_mxfp4.validation.texts import Text
from jax_mxfp4.validation.windows import Protocol, Windows

_CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Return the date, the device and the versions that a result depends on."""
    device = jax.devices()[0]
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": cpu_name() if device.platform == "cpu" else device.device_kind,
        "jax": jax.__version__,
        "jax_mxfp4": _package_version(),
    }
    if device.platform != "cpu":
        facts["runtime"] = " ".join(device.client.platform_version.split())
    return facts


def cpu_name() -> str:
    """Return the product name of the CPU, or its architecture where the system does not say."""
    if _CPU_INFO.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.machine()


def protocol_of(text: Text, tokens: int, protocol: Protocol, windows: Windows) -> dict[str, Any]:
    """Return everything that two perplexities must share to be comparable.

    Args:
      text: the text.
      tokens: how many the whole text has.
      protocol: how it was cut.
      windows: the result of that.
    """
    return {
        "text": text.form,
        "text_bytes": text.nbytes,
        "text_sha256": text.sha256,
        "text_tokens": tokens,
        "tokens_used": min(tokens, protocol.max_tokens or tokens),
        "window": protocol.window,
        "stride": protocol.stride,
        "bos": protocol.bos,
        "scored_tokens": windows.num_scored,
    }


def write_json(path: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a result as JSON with one line for each row.

    Numbers that JSON lacks, infinities (the SQNR of an exact result) and NaN, become null.

    Raises:
      OSError: the file cannot be written.
    """
    top = json.dumps(_finite(head), indent=2)
    lines = ",\n".join(f"    {json.dumps(_finite(row))}" for row in rows)
    path.write_text(f'{top[:-2]},\n  "rows": [\n{lines}\n  ]\n}}\n')


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _package_version() -> str:
    try:
        return version("jax-mxfp4")
    except PackageNotFoundError:  # a source tree that is not installed
        return "source tree"

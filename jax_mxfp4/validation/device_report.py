"""Is it the same numerics on two devices? One report for each, and what differs between two."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_mxfp4.checkpoints import read_json_object
from jax_mxfp4.models.gpt_oss import GptOss, load_tokenizer, mini_path
from jax_mxfp4.ops import Implementation
from jax_mxfp4.validation.device_suite import cases
from jax_mxfp4.validation.errors import tensor_error
from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss
from jax_mxfp4.validation.scoring import likelihood
from jax_mxfp4.validation.texts import read_text
from jax_mxfp4.validation.windows import Protocol, Windows, split

# Values of each result that a report holds, evenly spread.
_SAMPLES = 64
_TEXT = Protocol(window=256, stride=256, max_tokens=4096)


@dataclass(frozen=True)
class Record:
    """The result of one case with one implementation.

    Attributes:
      case: name.
      dtype: of the result.
      implementation: "reference", "cuda" or "dense"; "jax" for what has one implementation only.
      sha256: of the result's bytes, every NaN being the same.
      relative_rms: error against float64, of the finite values; None where there is no expectation.
      largest: largest absolute error, likewise.
      sample: some values of the result.
    """

    case: str
    dtype: str
    implementation: str
    sha256: str
    relative_rms: float | None
    largest: float | None
    sample: list[float]


@dataclass(frozen=True)
class RecordDifference:
    """One case on two devices.

    Attributes:
      case: name, dtype and implementation.
      identical: whether every bit is the same.
      left: relative RMS error of the first device, None where there is no expectation.
      right: of the second device.
      largest: largest difference of the sampled values over the largest of their magnitudes.
    """

    case: str
    identical: bool
    left: float | None
    right: float | None
    largest: float


def run_suite(implementations: Sequence[Implementation]) -> Iterator[Record]:
    """Run every case with each of `implementations`, and the built-in model `mini`.

    Args:
      implementations: "reference", "cuda" or both.

    Raises:
      RuntimeError: the CUDA kernels are asked for and cannot be had.
    """
    for case in cases():
        for implementation in implementations if case.expected is not None else (None,):
            result = np.asarray(case.run(implementation))
            name = implementation or "jax"
            yield _record(case.name, name, result, case.expected and case.expected())
    windows = _windows()
    for dtype in (jnp.float32, jnp.bfloat16):
        for implementation in implementations:
            model = GptOss.from_pretrained(mini_path(), dtype, implementation)
            yield from _model_records(model, str(implementation), windows)
        packed = GptOss.from_pretrained(mini_path(), dtype, "reference")
        yield from _model_records(DenseGptOss.from_packed(packed), "dense", windows)


def to_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the records as rows of a result file."""
    return [asdict(record) for record in records]


def read_report(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Read what `jax-mxfp4 eval device-report` wrote.

    Returns:
      What was measured on what, and the records.

    Raises:
      CheckpointError: a ValueError: the file cannot be read or is no JSON object.
      ValueError: it is no such report.
    """
    head = read_json_object(path)
    try:
        return head, [Record(**row) for row in head.pop("rows")]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a device report, found other JSON: {error}") from error


def compare_reports(left: list[Record], right: list[Record]) -> list[RecordDifference]:
    """Compare the cases that two reports share.

    Raises:
      ValueError: they share none.
    """
    others = {_key(record): record for record in right}
    pairs = [(record, others[_key(record)]) for record in left if _key(record) in others]
    if not pairs:
        raise ValueError("the two reports have no case in common")
    return [
        RecordDifference(
            case=", ".join(_key(one)),
            identical=one.sha256 == other.sha256,
            left=one.relative_rms,
            right=other.relative_rms,
            largest=_largest(one.sample, other.sample),
        )
        for one, other in pairs
    ]


def _key(record: Record) -> tuple[str, str, str]:
    return record.case, record.dtype, record.implementation


def _largest(left: list[float], right: list[float]) -> float:
    x, y = np.array(left), np.array(right)
    scale = np.max(np.abs(x), initial=0.0)
    difference = np.max(np.abs(x - y), initial=0.0)
    return float(difference / scale) if difference else 0.0


def _windows() -> Windows:
    tokens = load_tokenizer(mini_path()).encode(read_text().content, add_special_tokens=False).ids
    return split(tokens, _TEXT)


def _model_records(
    model: GptOss | DenseGptOss, implementation: str, windows: Windows
) -> Iterator[Record]:
    dtype = str(model.params.norm.dtype)
    logits = np.asarray(model(jnp.asarray(windows.tokens[:1])))
    yield _record(f"logits of the model mini in {dtype}", implementation, logits, None)
    perplexity = np.array([likelihood(model, windows).perplexity])
    yield _record(f"perplexity of the model mini in {dtype}", implementation, perplexity, None)


def _record(
    case: str, implementation: str, result: np.ndarray, expected: np.ndarray | None
) -> Record:
    values = result.astype(np.float64).reshape(-1)
    error = None
    if expected is not None:
        # Overflow and NaN are compared by the hash: differences of infinities are no numbers.
        finite = np.isfinite(values) & np.isfinite(expected.reshape(-1))
        error = tensor_error(expected.reshape(-1)[finite], values[finite])
    finite_values = values[np.isfinite(values)]
    spread = np.linspace(0, finite_values.size - 1, min(_SAMPLES, finite_values.size))
    return Record(
        case,
        str(result.dtype),
        implementation,
        _hash(result),
        error and error.relative_rms,
        error and error.largest,
        finite_values[spread.astype(np.int64)].tolist(),
    )


def _hash(result: np.ndarray) -> str:
    if result.dtype != np.uint8:
        result = np.where(np.isnan(result), np.array(np.nan, result.dtype), result)
    return hashlib.sha256(np.ascontiguousarray(result).tobytes()).hexdigest()

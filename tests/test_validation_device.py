"""The numerical suite for comparing devices, and its reports."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest

from jax_mxfp4.validation import device_report, device_suite
from jax_mxfp4.validation.device_report import Record, compare_reports, read_report, to_rows

NAMES = {"float32": 1e-6, "bfloat16": 3e-3, "float16": 4e-4}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    slow = ("matmul [16, ", "matmul [256, ", "moe 64 ")
    cases = [c for c in device_suite.cases() if not c.name.startswith(slow)]
    cases = [c for c in cases if c.name != "moe 1 tokens" or c.dtype == "bfloat16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_report, "cases", lambda: iter(cases))
        patch.setattr(device_report, "_model_records", lambda *_: iter(()))
        return list(device_report.run_suite(["reference"]))


def test_every_case_is_as_accurate_as_its_dtype(records: list[Record]) -> None:
    judged = [record for record in records if record.relative_rms is not None]
    assert len(judged) == 3 * 3 + 1
    for record in judged:
        assert record.implementation == "reference"
        exact = record.case.startswith(("dequantize", "take")) and record.dtype != "float16"
        assert record.relative_rms <= (0 if exact else NAMES[record.dtype]), record
    rules = [record.case for record in records if record.relative_rms is None]
    assert rules[:3] == ["quantize floor", "quantize even", "quantize rceil"]


def test_expected_results_agree_with_the_oracle_of_the_other_tests() -> None:
    rng = np.random.default_rng(5)
    gate_up, down = oracle.random_weight(rng, 4, 64, 32), oracle.random_weight(rng, 4, 32, 32)
    np.testing.assert_array_equal(device_suite._decode(down), oracle.decode(down))
    x = rng.standard_normal((3, 32)).astype(np.float16)
    ids, weights = device_suite._routing(rng, 3, 4)
    expected = oracle.moe(x, ids, weights, gate_up, None, down, None).exact
    found = device_suite._moe(x, ids, weights, gate_up, down)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_report_survives_its_file(records: list[Record], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"device": "A", "rows": to_rows(records)}))
    head, read = read_report(file)
    assert head == {"device": "A"}
    assert read == records
    differences = compare_reports(records, read)
    assert len(differences) == len(records)
    assert all(d.identical and d.largest == 0 for d in differences)


def test_differences_are_found(records: list[Record]) -> None:
    changed = list(records)
    sample = [2 * max(map(abs, records[3].sample)), *records[3].sample[1:]]
    changed[3] = replace(records[3], sha256="0" * 64, sample=sample, relative_rms=0.5)
    differences = compare_reports(records, changed)
    assert [i for i, d in enumerate(differences) if not d.identical] == [3]
    assert differences[3].largest > 0.9
    assert differences[3].right == 0.5


def test_other_files_and_other_suites_are_refused(records: list[Record], tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    for content in ({"rows": [{"case": "x"}]}, {}):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"other.json: expected a device report"):
            read_report(file)
    with pytest.raises(ValueError, match="no case in common"):
        compare_reports(records[:1], records[1:2])


def test_nan_of_any_kind_is_one_result() -> None:
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    one, two = (device_report._hash(np.array([1, x], np.float32)) for x in (quiet, other))
    assert one == two
    assert one != device_report._hash(np.array([1, 2], np.float32))

"""The report of `jax-mxfp4 doctor`, for this machine and for machines made up."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jax_mxfp4 import cli, doctor

GPU = doctor.Device("gpu", "NVIDIA H100", "9.0")
COMPLETE = doctor.Report(
    python="3.12.1",
    packages={"jax-mxfp4": "0.1.0", "jax": "0.12.0"},
    driver="580.65.06",
    devices=(GPU, GPU),
    backend_error=None,
    native="_native.abi3.so",
    cuda_version="13.0",
    cuda_architectures="80-real,90a-real,90-virtual",
    ffi_compiled="0.3",
    ffi_runtime="0.5",
    unavailable=None,
)
CPU_ONLY = dataclasses.replace(
    COMPLETE,
    driver=None,
    devices=(doctor.Device("cpu", "cpu", None),),
    cuda_version=None,
    cuda_architectures="",
    unavailable="built without them",
)


def test_doctor_succeeds_on_any_machine() -> None:
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    for fact in ("python", "jaxlib", "devices", "XLA FFI", "CUDA kernels"):
        assert f"\n{fact} " in f"\n{result.stdout}"


def test_nothing_is_lacking_in_a_complete_installation() -> None:
    assert doctor.lacking(COMPLETE) == []
    text = doctor.render(COMPLETE)
    assert "2 x NVIDIA H100 (sm_90)" in text
    assert "compiled with CUDA 13.0 for 80-real,90a-real,90-virtual" in text
    assert text.endswith("nothing is lacking: the CUDA kernels are in use")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"unavailable": "compiled for a newer XLA FFI"}, "No CUDA kernels: compiled for a newer"),
        ({"devices": (), "backend_error": "no such platform"}, "JAX cannot start: no such"),
        ({"devices": CPU_ONLY.devices}, "JAX sees no GPU although NVIDIA driver 580.65.06"),
        ({"driver": "570.124.06"}, "kernels compiled with CUDA 13.0 need 580 or newer"),
        ({"driver": None, "devices": CPU_ONLY.devices}, "No NVIDIA driver is loaded"),
        (
            {"devices": (doctor.Device("gpu", "Tesla T4", "7.5"),)},
            "Tesla T4 has compute capability 7.5",
        ),
    ],
)
def test_each_lack_is_one_sentence(changes: dict[str, object], expected: str) -> None:
    report = dataclasses.replace(COMPLETE, **changes)
    (sentence,) = doctor.lacking(report)
    assert expected in sentence
    assert f"  - {sentence}" in doctor.render(report)


def test_newer_and_amd_gpus_are_no_lack() -> None:
    newer = dataclasses.replace(COMPLETE, devices=(doctor.Device("gpu", "B200", "10.0"),))
    assert doctor.lacking(newer) == []
    amd = dataclasses.replace(CPU_ONLY, devices=(doctor.Device("gpu", "MI300X", None),))
    assert "1 x MI300X" in doctor.render(amd)


def test_memory_for_the_large_model() -> None:
    """75 % of an H100 is less than the weights of gpt-oss-120b."""

    def with_limit(limit: int | None) -> doctor.Report:
        return dataclasses.replace(
            COMPLETE, devices=(dataclasses.replace(GPU, memory_limit=limit),)
        )

    (sentence,) = doctor.advice(with_limit(63_700_000_000))
    assert "JAX may use 63.7 GB of NVIDIA H100" in sentence
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in sentence
    assert "XLA_PYTHON_CLIENT_PREALLOCATE=false" in sentence
    assert doctor.render(with_limit(63_700_000_000)).endswith(f"for large models:\n  - {sentence}")
    for limit in (80_700_000_000, None):
        assert doctor.advice(with_limit(limit)) == []


def test_driver_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert doctor.driver_version(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    assert doctor.driver_version(file) == "580.65.06"
    file.write_text("something else")
    assert doctor.driver_version(file) == "of an unknown version"

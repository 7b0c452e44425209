"""What an installation consists of and what it lacks: the facts behind `jax-mxfp4 doctor`."""

import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jax_mxfp4 import ffi

_PACKAGES = ("jax-mxfp4", "jax", "jaxlib", "flax", "numpy", "ml_dtypes", "nanobind-backend")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# A statically linked CUDA 13 runtime refuses drivers older than this (CUDA 13.0 release notes).
_OLDEST_DRIVER = {12: 525, 13: 580}

_WEIGHTS_120B = 65_248_815_744  # bytes of openai/gpt-oss-120b
_WORKING_MEMORY = 3_000_000_000  # activations, a cache of 8192 positions and what XLA keeps
_MEM_FRACTION = 0.95  # of a card that the driver leaves to one process, with a margin


@dataclass(frozen=True)
class Device:
    """One JAX device.

    Attributes:
        platform: such as "cpu" or "gpu".
        kind: its product name.
        compute_capability: CUDA only.
        memory_limit: bytes that JAX may use of it, None where JAX does not tell.
    """

    platform: str
    kind: str
    compute_capability: str | None
    memory_limit: int | None = None


@dataclass(frozen=True)
class Report:
    """Facts about an installation, collected once so that they can be judged and printed.

    Attributes:
        python: version of the interpreter.
        packages: version of each package that matters, None where it is not installed.
        driver: version of the NVIDIA kernel driver, None without one.
        devices: what JAX can use, empty when `backend_error` is set.
        backend_error: why JAX could not start any backend.
        native: path of the native module, None where it is not built.
        cuda_version: of the toolkit that compiled the kernels, None without kernels.
        cuda_architectures: that the kernels were compiled for.
        ffi_compiled: XLA FFI version of the native module, None where it is not built.
        ffi_runtime: XLA FFI version of the installed jaxlib.
        unavailable: why no program can call the kernels, None when they are registered.
    """

    python: str
    packages: dict[str, str | None]
    driver: str | None
    devices: tuple[Device, ...]
    backend_error: str | None
    native: str | None
    cuda_version: str | None
    cuda_architectures: str
    ffi_compiled: str | None
    ffi_runtime: str
    unavailable: str | None


def collect() -> Report:
    """Gather the facts about this process's installation."""
    build = ffi.build_info()
    devices: tuple[Device, ...] = ()
    backend_error = None
    try:
        devices = tuple(
            Device(d.platform, d.device_kind, ffi.compute_capability(d), _memory_limit(d))
            for d in jax.devices()
        )
    except RuntimeError as error:  # for example JAX_PLATFORMS=cuda on a machine without a GPU
        backend_error = str(error)
    return Report(
        python=platform.python_version(),
        packages={name: _package_version(name) for name in _PACKAGES},
        driver=driver_version(_DRIVER_FILE),
        devices=devices,
        backend_error=backend_error,
        native=build["native"],
        cuda_version=build["cuda_version"],
        cuda_architectures=build["cuda_architectures"],
        ffi_compiled=build["ffi_compiled"],
        ffi_runtime=build["ffi_runtime"],
        unavailable=build["unavailable"],
    )


def default_implementation() -> str:
    """Return what packed operations run on the default device: "cuda" or "reference"."""
    return "cuda" if ffi.runs_kernels(jax.devices()[0]) else "reference"


def driver_version(file: Path) -> str | None:
    """Return the NVIDIA driver's version from its own `file`, None when there is no driver."""
    if not file.exists():
        return None
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", file.read_text())
    return match[1] if match else "of an unknown version"


def lacking(report: Report) -> list[str]:
    """Return one sentence for each thing that keeps the CUDA kernels from being used."""
    missing = []
    if report.unavailable is not None:
        missing.append(f"No CUDA kernels: {report.unavailable}.")
    if report.backend_error is not None:
        missing.append(f"JAX cannot start: {report.backend_error}")
    gpus = [device for device in report.devices if device.compute_capability is not None]
    if report.driver is None:
        missing.append("No NVIDIA driver is loaded: programs run on the CPU.")
    elif not gpus and report.backend_error is None:
        missing.append(
            f"JAX sees no GPU although NVIDIA driver {report.driver} is loaded: "
            "pip install 'jax[cuda13]' (or cuda12) installs its CUDA plugin."
        )
    return missing + _outdated_driver(report) + _outdated_gpus(report, gpus)


def _outdated_driver(report: Report) -> list[str]:
    """Return a sentence when the driver is too old for the CUDA runtime inside the kernels."""
    if report.driver is None or report.cuda_version is None:
        return []
    oldest = _OLDEST_DRIVER.get(_numbers(report.cuda_version)[0])
    found = _numbers(report.driver)
    if oldest is None or not found or found[0] >= oldest:
        return []
    return [
        f"NVIDIA driver {report.driver} is too old: kernels compiled with CUDA "
        f"{report.cuda_version} need {oldest} or newer."
    ]


def _outdated_gpus(report: Report, gpus: list[Device]) -> list[str]:
    """Return a sentence for each GPU that is older than every compiled architecture."""
    compiled = _numbers(report.cuda_architectures)  # "80;90a" and the like
    return [
        f"{gpu.kind} has compute capability {gpu.compute_capability}: the kernels were compiled "
        f"for {report.cuda_architectures}."
        for gpu in gpus
        if compiled
        and gpu.compute_capability is not None
        and int(gpu.compute_capability.replace(".", "")) < min(compiled)
    ]


def advice(report: Report) -> list[str]:
    """Return one sentence for each setting that large models need and this process does not have.

    JAX takes 75 % of a GPU at its first use and never more (XLA_PYTHON_CLIENT_MEM_FRACTION): of an
    80 GB card 63 GB, less than the weights of gpt-oss-120b.
    """
    needed = _WEIGHTS_120B + _WORKING_MEMORY
    small = [
        (device.memory_limit, device.kind)
        for device in report.devices
        if device.compute_capability is not None
        and device.memory_limit is not None
        and device.memory_limit < needed
    ]
    if not small:
        return []
    limit, kind = small[0]
    return [
        f"JAX may use {limit * 1e-9:.1f} GB of {kind}; gpt-oss-120b on one GPU "
        f"needs about {needed * 1e-9:.0f} GB. On a card of 80 GB set "
        f"XLA_PYTHON_CLIENT_MEM_FRACTION={_MEM_FRACTION} before Python starts "
        "(XLA_PYTHON_CLIENT_PREALLOCATE=false as well, where other processes use the GPU)."
    ]


def render(report: Report) -> str:
    """Return the report as text: one fact a line, then what is lacking and what could be set."""
    facts = {
        "python": report.python,
        **{name: found or "not installed" for name, found in report.packages.items()},
        "NVIDIA driver": report.driver or "none",
        "devices": _devices(report),
        "native module": report.native or "not built",
        "XLA FFI": f"compiled {report.ffi_compiled or '-'}, runtime {report.ffi_runtime}",
        "CUDA kernels": (
            f"compiled with CUDA {report.cuda_version} for {report.cuda_architectures}"
            if report.cuda_version
            else "not compiled in"
        ),
    }
    lines = [f"{name:<17}{value}" for name, value in facts.items()]
    missing = lacking(report)
    if missing:
        lines += ["", "lacking:", *(f"  - {sentence}" for sentence in missing)]
    else:
        lines += ["", "nothing is lacking: the CUDA kernels are in use"]
    if advised := advice(report):
        lines += ["", "for large models:", *(f"  - {sentence}" for sentence in advised)]
    return "\n".join(lines)


def _memory_limit(device: Any) -> int | None:
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def _devices(report: Report) -> str:
    counts: dict[str, int] = {}
    for device in report.devices:
        capability = device.compute_capability
        name = f"{device.kind} (sm_{capability.replace('.', '')})" if capability else device.kind
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))

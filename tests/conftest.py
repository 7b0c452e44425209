"""Fixtures, options and the GPU report shared by all tests."""

import functools
import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import pytest

import jax_mxfp4 as mx
from jax_mxfp4 import ffi

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "tests that need a CUDA device")
    group.addoption(
        "--require-gpu",
        action="store_true",
        help="fail the tests marked gpu, instead of skipping them, where they cannot run",
    )
    group.addoption(
        "--gpu-report", metavar="PATH", type=Path, help="write the results of gpu tests as JSON"
    )
    group.addoption(
        "--gpu-report-commit",
        metavar="HASH",
        help="commit to name in the report (default: git's HEAD)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Under pytest-xdist, the results of all workers arrive at the process that started them.
    is_worker = hasattr(config, "workerinput")
    if config.getoption("--gpu-report") is not None and not is_worker:
        config.pluginmanager.register(GpuReport(config), "gpu-report")


@functools.cache
def why_no_gpu() -> str | None:
    """Why tests marked gpu cannot run here, or None."""
    if ffi.why_unavailable() is not None:
        return ffi.why_unavailable()
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"JAX has no CUDA device: {error}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or why_no_gpu() is None:
        return
    if item.config.getoption("--require-gpu"):
        pytest.fail(f"--require-gpu: {why_no_gpu()}", pytrace=False)
    pytest.skip(f"needs a GPU: {why_no_gpu()}")


class GpuReport:
    """Counts the outcomes of tests marked gpu and writes them next to what produced them."""

    def __init__(self, config: pytest.Config) -> None:
        self._path: Path = config.getoption("--gpu-report")
        self._commit: str | None = config.getoption("--gpu-report-commit")
        self._root = config.rootpath
        self._outcomes: dict[str, str] = {}
        self._start = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "gpu" not in report.keywords:
            return
        # A test is reported up to three times (setup, call, teardown): the worst one counts.
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        counts = Counter(self._outcomes.values())
        device = None if why_no_gpu() else jax.devices("cuda")[0]
        build = ffi.build_info()
        report = {
            "device": device and device.device_kind,
            "compute_capability": device and device.compute_capability,
            "runtime": device and device.client.platform_version,
            "commit": self._commit or self._head(),
            "jax": jax.__version__,
            "cuda": build["cuda_version"],
            "architectures": build["cuda_architectures"],
            "passed": counts["passed"],
            "failed": counts["failed"],
            "skipped": counts["skipped"],
            "failures": sorted(name for name, end in self._outcomes.items() if end == "failed"),
            "seconds": round(time.monotonic() - self._start),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(report, indent=2) + "\n")

    def _head(self) -> str | None:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=self._root, capture_output=True, text=True
        )
        return git.stdout.strip() if git.returncode == 0 else None


@pytest.fixture(params=["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation of the operations; the CUDA one only where it can run."""
    return request.param


@pytest.fixture(params=["canonical", "prepared"])
def in_layout(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """A function that brings packed arrays into each layout."""
    return {"canonical": mx.canonical, "prepared": mx.prepare}[request.param]


@pytest.fixture
def kernels_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and lower as an installation with kernels does; lowering needs no handler."""
    monkeypatch.setattr(ffi, "_unavailable", None)


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch, kernels_registered: None) -> None:
    """Make every device pass for one on which programs call the kernels.

    What runs has to ask for implementation="reference": a CPU cannot run the kernels.
    """
    monkeypatch.setattr(ffi, "compute_capability", lambda device: "9.0")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """Behave as an installation without kernels; returns the reason it gives."""
    reason = "the test took the kernels away"
    monkeypatch.setattr(ffi, "_unavailable", reason)
    return reason

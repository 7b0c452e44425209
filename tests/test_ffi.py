"""Loading, refusing and registering the native module; sizes shared with the kernels."""

import itertools
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_mxfp4 as mx
from jax_mxfp4 import ffi

RUNTIME = (0, 3)


def native_module(*, version=RUNTIME, cuda=True, targets=ffi.TARGETS):
    """What ffi asks of the compiled module."""
    return SimpleNamespace(
        __file__="_native.so",
        registrations=lambda: {name: object() for name in targets} if cuda else {},
        xla_ffi_api_version=lambda: version,
        has_cuda=lambda: cuda,
        cuda_version=lambda: 12090 if cuda else 0,
        cuda_architectures=lambda: "80-real,90a-real" if cuda else "",
    )


@pytest.fixture
def registered(monkeypatch):
    """Calls of jax.ffi.register_ffi_target, which are recorded instead of made."""
    calls = []
    monkeypatch.setattr(
        jax.ffi, "register_ffi_target", lambda *args, **options: calls.append((args, options))
    )
    return calls


@pytest.mark.parametrize("version", [(0, 1), (0, 2), (0, 3)])
def test_compatible_handlers_are_registered_for_cuda(registered, version):
    assert ffi._register(native_module(version=version), RUNTIME) is None
    assert [args[0] for args, _ in registered] == list(ffi.TARGETS)
    assert all(options == {"platform": "CUDA"} for _, options in registered)


@pytest.mark.parametrize("version", [(0, 0), (0, 4), (1, 0)])
def test_incompatible_handlers_are_refused_with_a_warning(registered, version):
    native = native_module(version=version)
    with pytest.warns(RuntimeWarning) as caught:
        reason = ffi._register(native, RUNTIME)
    assert not registered
    assert len(caught) == 1
    for text in (reason, str(caught[0].message)):
        assert f"compiled for XLA FFI {version[0]}.{version[1]}, but jaxlib" in text
        assert "supports XLA FFI 0.1 to 0.3; upgrade jaxlib, or rebuild" in text


def test_refused_kernels_are_still_compiled_in(monkeypatch, registered):
    native = native_module(version=(0, 9))
    with pytest.warns(RuntimeWarning):
        reason = ffi._register(native, RUNTIME)
    monkeypatch.setattr(ffi, "_native", native)
    monkeypatch.setattr(ffi, "_unavailable", reason)
    assert mx.has_cuda_kernels()
    assert ffi.why_unavailable() == reason
    w = mx.quantize(np.ones((2, 32), np.float32))
    with pytest.raises(RuntimeError, match=r"compiled for XLA FFI 0\.9"):
        mx.dequantize(w, implementation="cuda")


def test_missing_handlers_are_refused_with_a_warning(registered):
    with pytest.warns(RuntimeWarning, match="lacks jax_mxfp4_moe; rebuild"):
        reason = ffi._register(native_module(targets=ffi.TARGETS[:-1]), RUNTIME)
    assert reason is not None
    assert not registered


@pytest.mark.parametrize(
    ("native", "message"), [(None, "is not built"), (native_module(cuda=False), "without CUDA")]
)
def test_builds_without_kernels_are_silent(registered, native, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert message in ffi._register(native, RUNTIME)
    assert not registered


def test_runtime_version_is_read_from_the_header(monkeypatch, tmp_path):
    assert ffi._runtime_ffi_version() >= (0, 3)  # what the oldest supported jaxlib has
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    header.write_text("// 1.2\n#define XLA_FFI_API_MAJOR 1\n\n#define XLA_FFI_API_MINOR 27\n")
    assert ffi._runtime_ffi_version() == (1, 27)
    header.write_text("#define XLA_FFI_API_MAJOR 1\n")
    with pytest.raises(ImportError, match=r"c_api\.h does not define .*MINOR"):
        ffi._runtime_ffi_version()


def test_this_installation_is_consistent():
    info = ffi.build_info()
    assert info["cuda_kernels"] == mx.has_cuda_kernels()
    assert info["unavailable"] == ffi.why_unavailable()
    assert (info["native"] is None) == (info["ffi_compiled"] is None)
    if not mx.has_cuda_kernels():
        assert ffi.why_unavailable() is not None


def test_build_info(monkeypatch):
    monkeypatch.setattr(ffi, "_native", native_module())
    monkeypatch.setattr(ffi, "_unavailable", None)
    info = ffi.build_info()
    assert info.pop("ffi_runtime") == ffi._dotted(ffi._runtime_ffi_version())
    assert info == {
        "native": "_native.so",
        "cuda_kernels": True,
        "cuda_version": "12.9",
        "cuda_architectures": "80-real,90a-real",
        "ffi_compiled": "0.3",
        "unavailable": None,
    }
    monkeypatch.setattr(ffi, "_native", native_module(cuda=False))
    assert ffi.build_info()["cuda_version"] is None
    assert not mx.has_cuda_kernels()
    monkeypatch.setattr(ffi, "_native", None)
    assert ffi.build_info()["ffi_compiled"] is None
    assert not mx.has_cuda_kernels()


def test_registration_leaves_other_backends_alone():
    """Handlers are registered at import; the CPU backend must still start, in a new process."""
    program = (
        "import warnings; warnings.simplefilter('error')\n"
        "import jax_mxfp4 as mx, jax.numpy as jnp\n"
        "w = mx.quantize(jnp.ones((2, 32)))\n"
        "print(mx.matmul(jnp.ones((1, 32)), w)[0, 0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "32.0"


# Sizes -------------------------------------------------------------------------------------------


def test_moe_schedule_size():
    assert ffi.moe_schedule_size(1, 32) == 4 + 4 * 1 + 2 * 1
    assert ffi.moe_schedule_size(4, 32) == 4 + 4 * 4 + 2 * 4
    assert ffi.moe_schedule_size(1200, 32) == 4 + 4 * (32 + 150) + 2 * 1200
    assert ffi.moe_schedule_size(17, 1) == 4 + 4 * (1 + 3) + 2 * 17


def test_moe_schedule_size_of_a_symbolic_number_of_tokens():
    [tokens] = export.symbolic_shape("tokens")
    schedule = jax.jit(lambda x: jnp.zeros(ffi.moe_schedule_size(4 * x.shape[0], 32)))
    module = export.export(schedule)(jax.ShapeDtypeStruct((tokens,), jnp.float32))
    for count in (1, 7, 300):
        shape = module.call(np.zeros(count, np.float32)).shape
        assert shape == (ffi.moe_schedule_size(4 * count, 32),)


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_moe_schedule_holds_every_routing(experts):
    """Tiles of 8 pairs of one expert each: no distribution of pairs needs more than there are."""
    for pairs in range(1, 41):
        needed = max(
            sum(-(-count // 8) for count in counts)
            for counts in itertools.product(range(pairs + 1), repeat=experts)
            if sum(counts) <= pairs
        )
        room = (ffi.moe_schedule_size(pairs, experts) - 2 * pairs - 4) // 4
        assert needed <= room

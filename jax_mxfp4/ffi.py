"""XLA FFI bindings of the CUDA kernels: the only importer of the native module.

The compiled handlers are registered once, when this module is imported. A handler that was
compiled for a newer XLA FFI than the installed jaxlib's is never registered: registration is
lazy, so the refusal would surface later as "Unable to initialize backend" and take the whole
backend down. `why_unavailable` says in that case what to do.
"""

import importlib
import importlib.util
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import Array, export
from jax.core import ShapedArray, min_dim
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.block_layouts import prepare

TARGETS = ("jax_mxfp4_dequantize", "jax_mxfp4_take", "jax_mxfp4_matmul", "jax_mxfp4_moe")

DISABLE_EXPORT_CHECKS = tuple(export.DisabledSafetyCheck.custom_call(name) for name in TARGETS)
"""Pass as `jax.export.export(..., disabled_checks=...)` to export programs for CUDA.

JAX refuses to export custom calls whose stability it does not know. The operands, results and
attributes of these targets are fixed within one release of jax-mxfp4.
"""

_NATIVE = "jax_mxfp4._native"
_OLDEST_FFI_VERSION = (0, 1)  # xla/ffi/ffi_registry.cc, IsSupportedApiVersion


def _runtime_ffi_version() -> tuple[int, int]:
    """The (major, minor) XLA FFI version of the installed jaxlib, from its own C header."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    numbers = dict(
        re.findall(r"^#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text(), re.MULTILINE)
    )
    if numbers.keys() != {"MAJOR", "MINOR"}:
        raise ImportError(f"{header} does not define XLA_FFI_API_MAJOR and XLA_FFI_API_MINOR")
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


def _load() -> Any | None:
    """The native module, or None in a source tree where it has not been built.

    A native module that exists and fails to import is a broken installation: the error is left
    to the caller.
    """
    if importlib.util.find_spec(_NATIVE) is None:
        return None
    return importlib.import_module(_NATIVE)


def _refusal(native: Any | None, runtime: tuple[int, int]) -> str | None:
    """Why the handlers of `native` cannot be registered with this runtime, or None."""
    if native is None:
        return "the native module of jax-mxfp4 is not built; install the package with pip"
    if not native.has_cuda():
        return (
            "jax-mxfp4 was built without CUDA kernels; "
            "rebuild it where nvcc is on the PATH, with JAX_MXFP4_CUDA=ON"
        )
    compiled = tuple(native.xla_ffi_api_version())
    if not _OLDEST_FFI_VERSION <= compiled <= runtime:
        return (
            f"its CUDA kernels were compiled for XLA FFI {_dotted(compiled)}, but jaxlib "
            f"{jaxlib.version.__version__} supports XLA FFI {_dotted(_OLDEST_FFI_VERSION)} to "
            f"{_dotted(runtime)}; upgrade jaxlib, or rebuild jax-mxfp4 against this one with "
            "pip install --no-build-isolation --no-cache-dir"
        )
    missing = set(TARGETS) - native.registrations().keys()
    if missing:
        return f"the native module lacks {', '.join(sorted(missing))}; rebuild jax-mxfp4"
    return None


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _register(native: Any | None, runtime: tuple[int, int]) -> str | None:
    """Register the handlers of `native` and return None, or return why that cannot be done.

    Kernels that were compiled in and cannot be used are worth a warning; a build without them
    is not.
    """
    refusal = _refusal(native, runtime)
    if refusal is None and native is not None:
        for name, handler in native.registrations().items():
            # "CUDA", not "gpu": the latter would claim ROCm devices too.
            jax.ffi.register_ffi_target(name, handler, platform="CUDA")
    elif native is not None and native.has_cuda():
        warnings.warn(f"jax-mxfp4 runs without CUDA kernels: {refusal}", RuntimeWarning, 2)
    return refusal


_native = _load()
_unavailable: str | None = _register(_native, _runtime_ffi_version())


def has_cuda_kernels() -> bool:
    """Whether CUDA kernels are compiled into this installation; needs no GPU to be true."""
    return _native is not None and _native.has_cuda()


def why_unavailable() -> str | None:
    """Why no program can call the CUDA kernels, or None when they are registered."""
    return _unavailable


def compute_capability(device: Any) -> str | None:
    """The compute capability of a CUDA device, such as "9.0"; None for other devices."""
    # ROCm devices, whose platform is "gpu" as well, have the attribute too, as in "gfx942".
    found = getattr(device, "compute_capability", None)
    return found if found is not None and re.fullmatch(r"\d+\.\d+", found) else None


def runs_kernels(device: Any) -> bool:
    """Whether programs on `device` call the kernels, unless they are told not to."""
    return why_unavailable() is None and compute_capability(device) is not None


def build_info() -> dict[str, Any]:
    """Facts about the native module, for display.

    Keys: native (its path or None), cuda_kernels, cuda_version ("13.0" or None),
    cuda_architectures, ffi_compiled and ffi_runtime (XLA FFI versions), unavailable.
    """
    info: dict[str, Any] = {
        "native": None,
        "cuda_kernels": has_cuda_kernels(),
        "cuda_version": None,
        "cuda_architectures": "",
        "ffi_compiled": None,
        "ffi_runtime": _dotted(_runtime_ffi_version()),
        "unavailable": why_unavailable(),
    }
    if _native is not None:
        cuda_version = _native.cuda_version()
        info["native"] = _native.__file__
        info["ffi_compiled"] = _dotted(_native.xla_ffi_api_version())
        info["cuda_architectures"] = _native.cuda_architectures()
        if cuda_version:
            info["cuda_version"] = f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"
    return info


def _bias_operand(bias: Array | None) -> Array:
    # FFI operands cannot be optional: no bias is an empty one.
    return jnp.zeros((0,), jnp.float32) if bias is None else bias


def _is_prepared(w: MXFP4Array) -> np.bool_:
    return np.bool_(w.layout == "prepared")


# Each wrapper takes the shape and dtype of its result first.


def dequantize(result: jax.ShapeDtypeStruct, w: MXFP4Array) -> Array:
    """Decode w [..., K], in either layout."""
    call = jax.ffi.ffi_call("jax_mxfp4_dequantize", result)
    return call(w.blocks, w.scales, prepared=_is_prepared(w))


def take(result: jax.ShapeDtypeStruct, w: MXFP4Array, ids: Array) -> Array:
    """Decode the rows ids (int32 [n]) of w [V, K], in either layout, to [n, K]."""
    call = jax.ffi.ffi_call("jax_mxfp4_take", result)
    return call(w.blocks, w.scales, ids, prepared=_is_prepared(w))


def matmul(result: jax.ShapeDtypeStruct, x: Array, w: MXFP4Array, bias: Array | None) -> Array:
    """x [M, K] times the transpose of w [N, K], plus bias [N]: [M, N].

    The handler reads prepared blocks only: a canonical w is prepared before, in the same program.
    """
    w = prepare(w)
    call = jax.ffi.ffi_call("jax_mxfp4_matmul", result)
    return call(x, w.blocks, w.scales, _bias_operand(bias))


def moe_schedule_size(pairs: int, num_experts: int) -> int:
    """int32 words in the workspace where the MoE kernel schedules its (token, expert) pairs.

    Four words of head, four per token tile (a tile holds up to 8 pairs of one expert, so there are
    at most num_experts + ceil(pairs / 8) tiles, and never more than pairs), and two per pair.
    """
    tiles = min_dim(pairs, num_experts + (pairs + 7) // 8)
    return 4 + 4 * tiles + 2 * pairs


def moe(
    result: jax.ShapeDtypeStruct,
    x: Array,
    expert_ids: Array,
    expert_weights: Array,
    gate_up: MXFP4Array,
    gate_up_bias: Array | None,
    down: MXFP4Array,
    down_bias: Array | None,
    *,
    alpha: float,
    limit: float,
) -> Array:
    """GPT-OSS expert layer on x [T, D], expert_ids int32 [T, k], expert_weights f32 [T, k].

    The handler reads prepared blocks only: canonical weights are prepared before, in the same
    program.
    """
    gate_up, down = prepare((gate_up, down))
    pairs = expert_ids.shape[0] * expert_ids.shape[1]
    num_experts, width, intermediate = down.shape
    # Handlers must not allocate (CUDA graphs), so their workspaces are results.
    hidden = jax.ShapeDtypeStruct((pairs, intermediate), x.dtype)
    partial = jax.ShapeDtypeStruct((pairs, width), jnp.float32)
    schedule = jax.ShapeDtypeStruct((moe_schedule_size(pairs, num_experts),), jnp.int32)
    call = jax.ffi.ffi_call("jax_mxfp4_moe", (result, hidden, partial, schedule))
    out, *_ = call(
        x,
        expert_ids,
        expert_weights,
        gate_up.blocks,
        gate_up.scales,
        _bias_operand(gate_up_bias),
        down.blocks,
        down.scales,
        _bias_operand(down_bias),
        alpha=np.float32(alpha),
        limit=np.float32(limit),
    )
    return out


# Stands in for an op on platforms other than CUDA when the caller insisted on
# implementation="cuda". Without it, XLA would compile and then report an unknown custom call.
_cuda_only_p = Primitive("jax_mxfp4_cuda_only")


def cuda_only(result: jax.ShapeDtypeStruct) -> Array:
    """A value of the given shape and dtype that fails to lower on every platform."""
    return _cuda_only_p.bind(shape=result.shape, dtype=result.dtype)


@_cuda_only_p.def_abstract_eval
def _(*, shape: tuple[int, ...], dtype: np.dtype) -> ShapedArray:
    return ShapedArray(shape, dtype)


def _refuse_lowering(ctx: mlir.LoweringRuleContext, **_: Any) -> Any:
    platforms = ctx.module_context.platforms
    raise RuntimeError(
        'implementation="cuda" needs a CUDA device, but the computation is being compiled for '
        f'{", ".join(platforms)}; use implementation=None or "reference" there'
    )


mlir.register_lowering(_cuda_only_p, _refuse_lowering)

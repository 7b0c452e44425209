"""MXFP4 (OCP Microscaling) arrays and operations for JAX, with CUDA kernels."""

from importlib.metadata import PackageNotFoundError, version

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.block_layouts import canonical, prepare
from jax_mxfp4.ffi import DISABLE_EXPORT_CHECKS, has_cuda_kernels
from jax_mxfp4.format import BLOCK_SIZE
from jax_mxfp4.ops import dequantize, matmul, moe, prepare_on_cuda, take
from jax_mxfp4.quantize import fake_quantize, quantize

try:
    __version__ = version("jax-mxfp4")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BLOCK_SIZE",
    "DISABLE_EXPORT_CHECKS",
    "MXFP4Array",
    "__version__",
    "canonical",
    "dequantize",
    "fake_quantize",
    "has_cuda_kernels",
    "matmul",
    "moe",
    "prepare",
    "prepare_on_cuda",
    "quantize",
    "take",
]

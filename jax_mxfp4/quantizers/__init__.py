"""Quantizers beyond rounding each element to nearest, which `jax_mxfp4.quantize` does.

Without calibration:

* `stochastic_quantize`: unbiased rounding, with an explicit key;
* `diffuse_quantize`: the error of an element is added to the next;
* `rotate`: a Hadamard matrix on every block, against heavy tails; `RotatedDense` is a linear layer
  with a rotated weight, `fold_rotations` puts the rotations of a `Llama` into its own weights.

With calibration text:

* `gptq`: one weight, given the second moments of its inputs;
* `calibrate_and_quantize`: a whole model, layer by layer;
* `calibrated_packer`: a checkpoint on disk, for `jax_mxfp4.convert`.

The result of each is an ordinary `MXFP4Array`, at 4.25 bits per weight.
"""

from jax_mxfp4.quantizers.calibration import calibrate_and_quantize
from jax_mxfp4.quantizers.checkpoints import calibrated_packer
from jax_mxfp4.quantizers.folding import fold_rotations
from jax_mxfp4.quantizers.gpt_oss import calibrate_experts, quantize_gpt_oss
from jax_mxfp4.quantizers.gptq import gptq
from jax_mxfp4.quantizers.hadamard import RotatedDense, rotate
from jax_mxfp4.quantizers.llama import quantize_llama
from jax_mxfp4.quantizers.options import GptqOptions, WeightReport, calibration_windows
from jax_mxfp4.quantizers.rounding import diffuse_quantize, stochastic_quantize

__all__ = [
    "GptqOptions",
    "RotatedDense",
    "WeightReport",
    "calibrate_and_quantize",
    "calibrate_experts",
    "calibrated_packer",
    "calibration_windows",
    "diffuse_quantize",
    "fold_rotations",
    "gptq",
    "quantize_gpt_oss",
    "quantize_llama",
    "rotate",
    "stochastic_quantize",
]

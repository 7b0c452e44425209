"""Is it right, how accurate is it, and where does it hurt?

* `errors`: SQNR, relative RMS, cosine of tensors; KL and top-1 agreement of logits
* `windows`, `scoring`: perplexity in sliding windows, distance to a base model
* `formats`, `comparison`, `synthetic`: other storage formats, on models and on random data
* `sensitivity`: one tensor, layer or kind of matrix at a time
* `divergence`: the first layer in which two implementations differ
* `device_report`: the same numerics on two devices

A model is anything that `models.LanguageModel` describes. The commands `jax-mxfp4 eval ...` are
made of these.
"""

from jax_mxfp4.validation.comparison import FormatResult, NotApplicable, compare_formats
from jax_mxfp4.validation.divergence import (
    LayerError,
    compare_captures,
    compare_layers,
    first_divergence,
)
from jax_mxfp4.validation.errors import (
    TensorError,
    kl_divergence,
    negative_log_likelihood,
    tensor_error,
    top1_agreement,
)
from jax_mxfp4.validation.formats import FORMATS, Format
from jax_mxfp4.validation.models import (
    LanguageModel,
    replace_weights,
    select_matrices,
    weight_matrices,
)
from jax_mxfp4.validation.scoring import Baseline, Distance, Likelihood, likelihood
from jax_mxfp4.validation.sensitivity import Sensitivity, sensitivities
from jax_mxfp4.validation.windows import Protocol, Windows, split

__all__ = [
    "FORMATS",
    "Baseline",
    "Distance",
    "Format",
    "FormatResult",
    "LanguageModel",
    "LayerError",
    "Likelihood",
    "NotApplicable",
    "Protocol",
    "Sensitivity",
    "TensorError",
    "Windows",
    "compare_captures",
    "compare_formats",
    "compare_layers",
    "first_divergence",
    "kl_divergence",
    "likelihood",
    "negative_log_likelihood",
    "replace_weights",
    "select_matrices",
    "sensitivities",
    "split",
    "tensor_error",
    "top1_agreement",
    "weight_matrices",
]

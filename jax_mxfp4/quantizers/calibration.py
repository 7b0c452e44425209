"""One entry for all models that can be calibrated."""

from pathlib import Path
from typing import Any, Protocol, overload

from jax.typing import ArrayLike

from jax_mxfp4.models.gpt_oss import GptOss, GptOssConfig, Params
from jax_mxfp4.models.llama import Llama
from jax_mxfp4.quantizers.gpt_oss import quantize_gpt_oss
from jax_mxfp4.quantizers.llama import quantize_llama
from jax_mxfp4.quantizers.options import DEFAULT_OPTIONS, GptqOptions, Progress, WeightReport


class DenseGptOss(Protocol):
    """A GPT-OSS model with dense experts, such as `jax_mxfp4.validation` loads."""

    @property
    def params(self) -> Params:
        """As of `GptOss`, but `gate_up` [E, 2I, D] and `down` [E, D, I] are dense."""
        ...

    @property
    def config(self) -> GptOssConfig:
        """Hyperparameters."""
        ...


@overload
def calibrate_and_quantize(
    model: Llama,
    tokens: ArrayLike,
    options: GptqOptions = ...,
    *,
    checkpoint: str | Path | None = ...,
    progress: Progress | None = ...,
) -> tuple[Llama, tuple[WeightReport, ...]]: ...


@overload
def calibrate_and_quantize(
    model: DenseGptOss,
    tokens: ArrayLike,
    options: GptqOptions = ...,
    *,
    checkpoint: str | Path | None = ...,
    progress: Progress | None = ...,
) -> tuple[GptOss, tuple[WeightReport, ...]]: ...


def calibrate_and_quantize(
    model: Any,
    tokens: ArrayLike,
    options: GptqOptions = DEFAULT_OPTIONS,
    *,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Any, tuple[WeightReport, ...]]:
    """Pack the weights of a model with `gptq`, layer by layer, on calibration text.

    A `Llama` gets all linear layers of its blocks packed (`quantize_llama` can also rotate their
    inputs), a GPT-OSS model its experts.

    Args:
      model: a `Llama`, or a GPT-OSS model with dense experts; it is not changed.
      tokens: calibration text, integers [B, T], such as `calibration_windows` makes. Never the
        text that the result is judged by.
      options: see `GptqOptions`.
      checkpoint: folder in which finished layers are kept. A later call with the same arguments
        and folder goes on after the last of them.
      progress: called after each weight with (name, weights done so far, weights in all).

    Returns:
      The packed model, and one report for each weight that this call rounded.

    Raises:
      TypeError: the model is of another kind.
      ValueError: tokens are no [B, T], weights are packed already, or `checkpoint` belongs to
        another calibration.
    """
    arguments = {"checkpoint": checkpoint, "progress": progress}
    if isinstance(model, Llama):
        return quantize_llama(model, tokens, options, **arguments)
    if isinstance(getattr(model, "config", None), GptOssConfig):
        return quantize_gpt_oss(model.params, model.config, tokens, options, **arguments)
    raise TypeError(f"model: expected a Llama or a GPT-OSS model, found {type(model).__name__}")

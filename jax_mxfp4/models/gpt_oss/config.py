"""The hyperparameters of a GPT-OSS model."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from jax_mxfp4.format import BLOCK_SIZE

LayerType = Literal["sliding_attention", "full_attention"]


def _not_positive(config: Any) -> list[str]:
    """Return a sentence for each numeric field that is not a finite number above 0."""
    return [
        f"{field.name}: expected a number above 0, found {value!r}"
        for field in fields(config)
        if isinstance(value := getattr(config, field.name), int | float)
        and not isinstance(value, bool)
        and not 0 < value < math.inf
    ]


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Context extension of the rotary embedding (YaRN, arXiv:2309.00071).

    Attributes:
      factor: how many times longer than the original the context is.
      original_max_position_embeddings: context length before the extension.
      beta_fast: dimensions with more rotations than this over the original context are kept.
      beta_slow: dimensions with fewer rotations than this are interpolated fully.
      truncate: whether the two ends of the ramp between those are rounded outwards to whole
        dimensions; GPT-OSS does not round.
      attention_factor: scale of the cosines and sines; None for 0.1 ln(factor) + 1.

    Raises:
      ValueError: values outside their range, all at once.
    """

    factor: float = 32.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        problems = _not_positive(self)
        if not problems and self.beta_fast < self.beta_slow:
            problems.append(
                f"beta_fast: expected at least beta_slow ({self.beta_slow}), found {self.beta_fast}"
            )
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class GptOssConfig:
    """Hyperparameters of a GPT-OSS model; hashable, so that compiled functions can be keyed by it.

    Attributes:
      vocab_size: V, rows of the embedding and of the unembedding.
      hidden_size: D, a multiple of 32.
      intermediate_size: I, the width of one expert, a multiple of 32.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; query head h uses head h // (heads / kv heads).
      head_dim: width of one head, even.
      num_experts: E.
      experts_per_token: k, how many of them each token uses.
      layer_types: for each layer, whether its attention is sliding or full.
      sliding_window: how many positions a sliding layer sees, the query's own included.
      rms_norm_eps: added to the mean square.
      rope_theta: base of the rotary frequencies.
      rope_scaling: context extension, or None for plain rotary embedding.
      max_position_embeddings: longest supported sequence.
      swiglu_alpha: slope of the sigmoid in the experts' activation.
      swiglu_limit: clamp of that activation's inputs.
      eos_token_ids: tokens that end a generation.

    Raises:
      ValueError: values that contradict each other or lie outside their range, all at once.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    layer_types: tuple[LayerType, ...]
    sliding_window: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_scaling: YarnScaling | None = YarnScaling()
    max_position_embeddings: int = 131072
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the values, by themselves and against each other."""
        problems = _not_positive(self) or self._contradictions()
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.layer_types)

    def _contradictions(self) -> list[str]:
        problems = [
            f"{name}: expected a multiple of {BLOCK_SIZE}, found {getattr(self, name)}"
            for name in ("hidden_size", "intermediate_size")
            if getattr(self, name) % BLOCK_SIZE
        ]
        if self.rope_theta <= 1:
            problems.append(f"rope_theta: expected a number above 1, found {self.rope_theta}")
        if self.head_dim % 2:
            problems.append(f"head_dim: expected an even number, found {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                "num_attention_heads: expected a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), found {self.num_attention_heads}"
            )
        if self.experts_per_token > self.num_experts:
            problems.append(
                f"experts_per_token: expected at most num_experts ({self.num_experts}), "
                f"found {self.experts_per_token}"
            )
        if not self.layer_types or set(self.layer_types) - set(get_args(LayerType)):
            problems.append(
                f"layer_types: expected {' or '.join(get_args(LayerType))} for each layer, "
                f"found {list(self.layer_types)}"
            )
        outside = [i for i in self.eos_token_ids if not 0 <= i < self.vocab_size]
        if outside:
            problems.append(
                f"eos_token_ids: expected ids below vocab_size ({self.vocab_size}), found {outside}"
            )
        return problems

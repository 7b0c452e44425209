"""The hyperparameters of a Llama model."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Hyperparameters of a Llama model (arXiv:2302.13971), with grouped query heads.

    Attributes:
      vocab_size: V, rows of the embedding.
      hidden_size: D.
      intermediate_size: I, the width of the feed-forward block.
      num_layers: number of transformer blocks.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; query head h uses head h // (heads / kv heads).
      head_dim: width of one head, even.
      rms_norm_eps: added to the mean square.
      rope_theta: base of the rotary frequencies.
      max_position_embeddings: longest supported sequence.
      tie_embeddings: whether the embedding is also the output layer.

    Raises:
      ValueError: values that contradict each other or lie outside their range, all at once.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        """Check the values, by themselves and against each other."""
        numbers = {name: v for name, v in vars(self).items() if not isinstance(v, bool)}
        problems = [
            f"{name}: expected a number above 0, found {value!r}"
            for name, value in numbers.items()
            if not 0 < value < float("inf")
        ]
        if not problems:
            if self.head_dim % 2:
                problems.append(f"head_dim: expected an even number, found {self.head_dim}")
            if self.num_attention_heads % self.num_key_value_heads:
                problems.append(
                    "num_attention_heads: expected a multiple of num_key_value_heads "
                    f"({self.num_key_value_heads}), found {self.num_attention_heads}"
                )
        if problems:
            raise ValueError("; ".join(problems))

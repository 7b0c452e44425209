"""Typed look-ups in configuration data, shared by all dialects of it."""

from collections.abc import Mapping
from typing import Any

from jax_mxfp4.checkpoints.errors import shorten
from jax_mxfp4.models.gpt_oss.config import LayerType, YarnScaling

# The vocabulary of the released models, and the ids that end a generation there (their
# generation_config.json): <|return|>, <|endoftext|>, <|call|>. Only Hugging Face's files have ids.
HARMONY_VOCAB_SIZE = 201088
HARMONY_EOS_TOKEN_IDS = (200002, 199999, 200012)

# Sizes and positions are int32 in the model.
INT32_MAX = 2**31 - 1
# Ten times what the largest models have; each one costs memory before a tensor is seen.
_MAX_LAYERS = 1000

_REQUIRED: Any = object()


class Keys:
    """Typed look-ups in a JSON object that remember every problem instead of raising the first."""

    def __init__(self, data: Mapping[str, Any], prefix: str = "") -> None:
        """Look up in `data`; `prefix` comes before every key in messages."""
        self.data = data
        self.prefix = prefix
        self.problems: list[str] = []

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return data[key], which must be of `kind`; `null` counts as absent."""
        value = self.data.get(key)
        if value is None:
            if default is _REQUIRED:
                self.add(key, f"missing, expected {kind.__name__}")
            # After a problem the values are never used.
            return default
        # Not isinstance: True must not pass for 1.
        if type(value) is int and abs(value) > INT32_MAX:
            self.add(key, f"expected at most {INT32_MAX}, found {shorten(value)}")
        elif type(value) is int and kind is float:
            return float(value)
        elif type(value) is not kind:
            self.add(key, f"expected {kind.__name__}, found {shorten(value)}")
        return value

    def expect(self, key: str, supported: Any) -> None:
        """Require that data[key], where present, has the one value that is implemented."""
        value = self.data.get(key)
        if value is not None and value != supported:
            found = shorten(value)
            self.add(key, f"expected {supported!r}, the only supported value, found {found}")

    def add(self, key: str, problem: str) -> None:
        """Record a problem with `key`."""
        self.problems.append(f"'{self.prefix}{key}': {problem}")

    def section(self, key: str) -> "Keys | None":
        """Return the object under `key`, sharing this one's problems; None where it is absent."""
        value = self.get(key, dict, None)
        if not isinstance(value, dict):
            return None
        section = Keys(value, f"{self.prefix}{key}.")
        section.problems = self.problems
        return section


def count_layers(keys: Keys, key: str = "num_hidden_layers") -> int:
    """Return the number of layers under `key`, or 0 after recording what is wrong with it."""
    value = keys.get(key, int)
    if type(value) is not int:
        return 0
    if not 0 < value <= _MAX_LAYERS:
        keys.add(key, f"expected 1 to {_MAX_LAYERS}, found {value}")
        return 0
    return value


def alternating_layers(count: int) -> tuple[LayerType, ...]:
    """Return the released pattern: sliding, full, sliding, ..."""
    return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(count))


def yarn_scaling(keys: Keys, **arguments: Any) -> YarnScaling | None:
    """Return the scaling, or None where `keys` has problems or these values are one."""
    if keys.problems:
        return None
    try:
        return YarnScaling(**arguments)
    except ValueError as error:
        keys.problems += [f"{keys.prefix}{problem}" for problem in str(error).split("; ")]
        return None

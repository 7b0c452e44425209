"""Ways to damage files: their bytes, their JSON, and JSON inside them."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

_INTEGERS = (
    0,
    1,
    -1,
    31,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_VALUES: tuple[Any, ...] = (
    *_INTEGERS,
    *(10**30, 0.5, -0.0, 1e-300, 1e308, math.inf, math.nan, None, True, False),
    *("", "a" * 5000, "../model.safetensors", "/etc/passwd", "\ud800", "\0", "model.safetensors"),
    *("U8", "F4", "F6_E2M3", "BF16", "F64", "F8_E8M0", "I64", "BOOL", "yarn", "default"),
    *([], {}, [0], [-1], [1, 2**63], [2**40, 2**40], [[[[]]]], {"a": {"a": None}}, ["x"] * 1000),
)
# What JSON text may hold that a JSON value cannot express.
_TEXTS = (
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"9" * 5000,
    b"1e999999999",
    b"-" + b"1" * 400,
    b'"\\ud800"',
    b'"' + b"\\u0000" * 100 + b'"',
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\0",
    b"NaN",
    b"/* */",
    b",",
    b"}",
)


def damage_bytes(data: bytes, rng: random.Random, hot: int) -> bytes:
    """Damage one to three places, four times out of five within the first `hot` bytes."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        reach = min(hot, len(content)) if rng.random() < 0.8 else len(content)
        place = rng.randrange(max(reach, 1))
        operation = rng.randrange(8)
        length = rng.randint(1, rng.choice((4, 64, 4096)))
        if operation == 0:  # flip bits
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(max(reach, 1))
                content[at : at + 1] = bytes(
                    b ^ 1 << rng.randrange(8) for b in content[at : at + 1]
                )
        elif operation == 1:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(_INTEGERS) & (1 << 8 * width) - 1
            content[place : place + width] = number.to_bytes(width, "little")
        elif operation == 2:  # a length or offset that is nearly right
            old = int.from_bytes(content[place : place + 8], "little")
            new = (old + rng.choice((-32, -1, 1, 32))) & 2**64 - 1
            content[place : place + 8] = new.to_bytes(8, "little")
        elif operation == 3:
            del content[place : place + length]
        elif operation == 4:
            content[place:place] = content[place : place + length]
        elif operation == 5:  # splice
            other = rng.randrange(max(len(content), 1))
            content[place : place + length] = content[other : other + length]
        elif operation == 6:
            del content[rng.randrange(len(content) + 1) :]
        else:
            content += rng.randbytes(length)
    return bytes(content)


def damage_json(text: bytes, rng: random.Random) -> bytes:
    """Damage JSON text, three times out of four so that it stays valid."""
    choice = rng.random()
    if choice < 0.1:
        return damage_bytes(text, rng, len(text))
    if choice < 0.25:
        place = rng.randrange(len(text) + 1)
        end = place + rng.choice((0, 1, 20))
        return text[:place] + rng.choice(_TEXTS) + text[end:]
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        value = damage_value(value, rng)
    changed = json.dumps(value).encode(errors="surrogatepass")
    if rng.random() < 0.1 and isinstance(value, dict) and value:  # a key twice
        key = rng.choice(list(value))
        pair = json.dumps({key: rng.choice((value[key], *_VALUES))})[1:-1]
        changed = b"{" + pair.encode(errors="surrogatepass") + b"," + changed[1:]
    return changed


def damage_value(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one change somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value = dict(value)
        key = rng.choice(list(value))
        operation = rng.random()
        if operation < 0.1:
            del value[key]
        elif operation < 0.2:
            value[rng.choice((*value, "", "a.b", key + "x", "model_type"))] = value.pop(key)
        elif operation < 0.3:
            value[key] = value[rng.choice(list(value))]
        else:
            value[key] = damage_value(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        value = list(value)
        place = rng.randrange(len(value))
        operation = rng.random()
        if operation < 0.2:
            del value[place]
        elif operation < 0.4:
            value.insert(place, rng.choice(value))
        elif operation < 0.5:
            value.reverse()
        else:
            value[place] = damage_value(value[place], rng)
        return value
    if isinstance(value, int) and rng.random() < 0.6:
        change: Callable[[int], int] = rng.choice(
            (lambda n: n + 1, lambda n: n - 1, lambda n: n * 2, lambda n: n // 2, lambda n: n + 32)
        )
        return change(value)
    if isinstance(value, str) and value and rng.random() < 0.4:
        place = rng.randrange(len(value))
        return (
            value[:place] + rng.choice(("", "é", "..", "/", "\\", "9", value)) + value[place + 1 :]
        )
    return rng.choice(_VALUES)


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damage a safetensors file: its bytes, or its header so that its length stays right."""
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        return damage_bytes(data, rng, end)
    header = damage_json(data[8:end].rstrip(), rng)
    return len(header).to_bytes(8, "little") + header + data[end:]

"""Text from tokens that arrive one at a time."""

import pytest
from tokenizers import Tokenizer

from jax_mxfp4.models.gpt_oss.builtin import mini_path
from jax_mxfp4.streaming import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(mini_path() / "tokenizer.json"))


def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("Once — déjà vu 🙂<|endoftext|> 日本").ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == tokenizer.decode(tokens) == "Once — déjà vu 🙂 日本"
    assert stream.finish() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # a token that ended inside a character


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a🙂").ids[:-1]
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token) for token in tokens)
    assert text == "a"
    assert text + stream.finish() == tokenizer.decode(tokens)


def test_bytes_that_never_become_a_character_come_before_what_follows(
    tokenizer: Tokenizer,
) -> None:
    first, *_ = tokenizer.encode("🙂").ids
    (letter,) = tokenizer.encode("a").ids
    stream = TextStream(tokenizer)
    assert stream.push(first) == ""
    assert stream.push(letter) == "\ufffda"

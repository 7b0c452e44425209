"""The built-in model books-11m reproduces what transformers computed with it in float32."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4.models.gpt_oss import GptOss, builtin_path, mini_path
from jax_mxfp4.validation import Protocol, likelihood, split

GOLDEN = Path(__file__).parent / "golden"
TOKENS = np.load(GOLDEN / "mini-gptoss" / "ppl_golden.npz")
EXPECTED = np.load(GOLDEN / "books_11m.npz")


def test_perplexity(implementation):
    model = GptOss.from_pretrained(builtin_path("books-11m"), jnp.float32, implementation)
    windows = split(TOKENS["books_val.tokens"].reshape(-1), Protocol(window=256, stride=256))
    found = likelihood(model, windows, batch=16)
    np.testing.assert_allclose(found.perplexity, np.exp(EXPECTED["books_val.nll"]), rtol=1e-3)
    assert found.perplexity < 0.55 * np.exp(TOKENS["books_val.mxfp4.nll"])  # than mini's


def test_logits_of_the_first_positions():
    model = GptOss.from_pretrained(builtin_path("books-11m"), jnp.float32, "reference")
    texts = ("books_val", "wiki", "wikitext2_test_detok")
    expected = np.stack([EXPECTED[f"{text}.logits"] for text in texts])
    tokens = np.stack([TOKENS[f"{text}.tokens"][0, : expected.shape[1]] for text in texts])
    tolerance = 1e-4 if jax.default_backend() == "cpu" else 1e-3
    np.testing.assert_allclose(model(tokens), expected, rtol=0, atol=tolerance)


def test_folder_is_complete_and_small():
    folder = builtin_path()
    assert folder == builtin_path("books-11m")
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {"README.md", "LICENSE", "config.json", "model.safetensors"} <= set(files)
    assert sum(files.values()) < 8e6
    vocabulary = "tokenizer.json"
    assert (folder / vocabulary).read_bytes() == (mini_path() / vocabulary).read_bytes()


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="expected one of books-11m, mini, found 'large'"):
        builtin_path("large")

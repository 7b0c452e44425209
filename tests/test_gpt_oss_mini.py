"""The built-in model mini reproduces what transformers computed with it in float32."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4.models.gpt_oss import GptOss, load_tokenizer, mini_path

GOLDEN = np.load(Path(__file__).parent / "golden" / "mini-gptoss" / "ppl_golden.npz")
TEXTS = ["books_val", "wiki", "wikitext2_test_detok"]
BATCH = 16


@jax.jit
def negative_log_likelihoods(model: GptOss, tokens: jax.Array) -> jax.Array:
    """Returns -log p of every token after the first: [B, T] -> [B, T - 1]."""
    log_probabilities = jax.nn.log_softmax(model(tokens)[:, :-1])
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize("text", TEXTS)
def test_perplexity(text, implementation):
    model = GptOss.from_pretrained(mini_path(), jnp.float32, implementation)
    batches = np.split(GOLDEN[f"{text}.tokens"], 64 // BATCH)
    losses = [np.asarray(negative_log_likelihoods(model, batch), np.float64) for batch in batches]
    perplexity = np.exp(np.mean(losses))
    np.testing.assert_allclose(perplexity, np.exp(GOLDEN[f"{text}.mxfp4.nll"]), rtol=1e-3)


def test_perplexity_in_bfloat16():
    tokens = GOLDEN["books_val.tokens"][:BATCH]
    exact, rounded = (
        np.exp(np.mean(negative_log_likelihoods(model, tokens)))
        for model in (
            GptOss.from_pretrained(mini_path(), dtype, "reference")
            for dtype in (jnp.float32, jnp.bfloat16)
        )
    )
    np.testing.assert_allclose(rounded, exact, rtol=5e-3)


@pytest.mark.parametrize("text", TEXTS)
def test_logits_of_the_first_positions(text):
    model = GptOss.from_pretrained(mini_path(), jnp.float32, "reference")
    logits = model(GOLDEN[f"{text}.tokens"][:1, :64])[0]
    tolerance = 1e-4 if jax.default_backend() == "cpu" else 1e-3
    np.testing.assert_allclose(
        logits, GOLDEN[f"{text}.mxfp4.logits_w0_p64"], rtol=0, atol=tolerance
    )


def test_folder_is_complete():
    names = {file.name for file in mini_path().iterdir()}
    assert {"README.md", "LICENSE", "config.json", "tokenizer.json"} <= names
    assert load_tokenizer(mini_path()).get_vocab_size() == 1024

"""Windows, perplexity and the distance between models."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4.models.gpt_oss import GptOss, mini_path
from jax_mxfp4.validation import Baseline, Protocol, likelihood, split
from jax_mxfp4.validation.gpt_oss_dense import DenseGptOss
from jax_mxfp4.validation.texts import read_text
from jax_mxfp4.validation.windows import Windows

GOLDEN = np.load(Path(__file__).parent / "golden" / "mini-gptoss" / "ppl_golden.npz")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bigram:
    """Logits that depend on the last token alone."""

    table: jax.Array

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.table[tokens]


def bigram(seed: int = 0, size: int = 11) -> Bigram:
    return Bigram(jnp.float32(2 * np.random.default_rng(seed).standard_normal((size, size))))


def scored(windows: Windows) -> list[int]:
    return windows.tokens[windows.scored].tolist()


@pytest.mark.parametrize("length", [2, 7, 8, 9, 16, 17, 30])
@pytest.mark.parametrize("stride", [1, 3, 7])
def test_overlapping_windows_score_all_but_the_first_token_once(length: int, stride: int) -> None:
    windows = split(range(length), Protocol(window=8, stride=stride))
    assert windows.tokens.shape == windows.scored.shape == (len(windows.tokens), 8)
    assert scored(windows) == list(range(1, length))


def test_disjoint_windows_lose_the_first_token_of_each() -> None:
    windows = split(range(20), Protocol(window=8, stride=8))
    assert scored(windows) == [t for t in range(20) if t % 8]
    assert windows.tokens[2].tolist() == [16, 17, 18, 19, 19, 19, 19, 19]
    assert windows.num_scored == 17


def test_bos_takes_a_place_and_is_not_scored() -> None:
    windows = split(range(10, 20), Protocol(window=5, stride=4, bos=0))
    assert windows.tokens[:, 0].tolist() == [0, 0, 0]
    assert windows.tokens[1].tolist() == [0, 14, 15, 16, 17]
    assert scored(windows) == list(range(10, 20))


def test_every_scored_token_has_the_context_that_its_stride_promises() -> None:
    windows = split(range(100), Protocol(window=16, stride=4))
    context = np.argmax(windows.scored[1:], axis=1)
    assert context.tolist() == [12] * len(context)


def test_max_tokens() -> None:
    limited = split(range(100), Protocol(window=8, stride=8, max_tokens=20))
    np.testing.assert_array_equal(limited.tokens, split(range(20), Protocol(8, 8)).tokens)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"window": 1}, "window: expected at least 2 tokens, found 1"),
        ({"window": 8, "stride": 9}, "stride: expected 1 to 8, found 9"),
        ({"window": 8, "stride": 8, "bos": 1}, "stride: expected 1 to 7, found 8"),
        ({"window": 8, "stride": 0}, "stride: expected 1 to 8, found 0"),
        ({"max_tokens": 1}, "max_tokens: expected at least 2, found 1"),
    ],
)
def test_wrong_protocols(arguments: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Protocol(**arguments)


def test_a_text_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens: expected at least 2"):
        split([3], Protocol())


def test_likelihood_is_that_of_the_text_whatever_the_batch() -> None:
    tokens = np.random.default_rng(3).integers(0, 11, 60)
    model = bigram()
    log_p = np.asarray(jax.nn.log_softmax(model.table), np.float64)
    nll = -log_p[tokens[:-1], tokens[1:]]
    for batch in (1, 4, 64):
        found = likelihood(model, split(tokens, Protocol(window=8, stride=5)), batch)
        assert found.tokens == 59
        assert found.mean == pytest.approx(nll.mean(), rel=1e-6)
        assert found.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-6)
        assert found.standard_error == pytest.approx(nll.std() / np.sqrt(59), rel=1e-6)


def test_logits_of_nan_are_an_error() -> None:
    model = Bigram(bigram().table.at[4, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="logits are NaN at 2 of 5 tokens"):
        likelihood(model, split([1, 4, 2, 4, 3, 2], Protocol(window=8, stride=8)))


def test_distance_to_a_baseline() -> None:
    windows = split(np.random.default_rng(4).integers(0, 11, 60), Protocol(window=8, stride=5))
    base, other = bigram(), bigram(seed=1)
    baseline = Baseline(base, windows, batch=4, tie_margin=0.2)
    same, none = baseline.compare(base)
    assert same == baseline.likelihood == likelihood(base, windows)
    assert (none.kl, none.kl_99, none.top1) == (0, 0, 1)

    found, distance = baseline.compare(other)
    assert found == likelihood(other, windows)
    p, q = (np.asarray(jax.nn.log_softmax(m.table), np.float64) for m in (base, other))
    previous = windows.tokens[:, :-1][windows.scored[:, 1:]]
    kl = np.sum(np.exp(p) * (p - q), axis=-1)[previous]
    assert distance.kl == pytest.approx(kl.mean(), rel=1e-5)
    assert distance.kl_99 == pytest.approx(np.percentile(kl, 99), rel=1e-5)
    best = np.sort(np.asarray(base.table), axis=-1)
    decided = (best[:, -1] - best[:, -2] >= 0.2)[previous]
    agrees = (np.argmax(p, -1) == np.argmax(q, -1))[previous]
    assert 0 < distance.ties < 1
    assert distance.ties == pytest.approx(1 - decided.mean())
    assert distance.top1 == pytest.approx(agrees[decided].mean())


def golden_windows(count: int) -> Windows:
    tokens = GOLDEN["wikitext2_test_detok.tokens"][:count]
    return split(tokens.reshape(-1), Protocol(window=256, stride=256))


def test_perplexity_is_that_of_transformers() -> None:
    """The golden value is the mean over 64 windows of 255 scored tokens, as in `Protocol`."""
    model = GptOss.from_pretrained(mini_path(), jnp.float32, "reference")
    windows = golden_windows(64)
    assert windows.num_scored == 64 * 255
    found = likelihood(model, windows)
    assert found.mean == pytest.approx(float(GOLDEN["wikitext2_test_detok.mxfp4.nll"]), abs=1e-5)


def test_packed_weights_predict_as_the_same_weights_dequantized() -> None:
    windows = golden_windows(8)
    packed = GptOss.from_pretrained(mini_path(), jnp.float32, "reference")
    found = likelihood(packed, windows).perplexity
    dense = likelihood(DenseGptOss.from_packed(packed), windows).perplexity
    assert found == pytest.approx(dense, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_weights_predict_as_dequantized_ones_on_a_gpu(dtype) -> None:
    windows = golden_windows(64)
    packed = GptOss.from_pretrained(mini_path(), dtype, "cuda")
    found = likelihood(packed, windows, batch=16).perplexity
    dense = likelihood(DenseGptOss.from_packed(packed), windows, batch=16).perplexity
    assert found == pytest.approx(dense, rel=1e-3)


def test_texts_are_named_by_their_bytes(tmp_path: Path) -> None:
    builtin = read_text()
    assert builtin.content.startswith("CHAPTER I - I SET OFF UPON MY JOURNEY")
    assert builtin.nbytes == len(builtin.content.encode())
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\ntwo")
    text = read_text(file)
    assert (text.content, text.nbytes) == ("one\r\ntwo", 8)
    assert text.form == "a.txt, as it is in the file"
    assert text.sha256.startswith("29a776bb")
    for content, found in ((b"", "an empty file"), (b"\xff", "can't decode byte 0xff")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"a.txt: .*{found}"):
            read_text(file)

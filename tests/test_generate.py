"""Generation: greedy, sampled, streamed, batched."""

import dataclasses
import importlib
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mxfp4.checkpoints import CheckpointError
from jax_mxfp4.models.gpt_oss import GptOss, generate, load_tokenizer, mini_path
from jax_mxfp4.models.gpt_oss.sampling import greedy, sample

# The package has a function of this name.
generation = importlib.import_module("jax_mxfp4.models.gpt_oss.generate")

TINY = Path(__file__).parent / "golden" / "tiny-gptoss"
PROMPT = [10, 200, 3]


@pytest.fixture(scope="module")
def model() -> GptOss:
    """The first two layers of the model mini, enough for everything but sensible text."""
    mini = GptOss.from_pretrained(mini_path(), jnp.float32)
    config = dataclasses.replace(mini.config, layer_types=mini.config.layer_types[:2])
    return GptOss(dataclasses.replace(mini.params, layers=mini.params.layers[:2]), config)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(mini_path())


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_greedy_tokens_equal_those_of_transformers(layout, implementation):
    model = GptOss.from_pretrained(TINY / layout, jnp.float32, implementation)
    expected = np.load(TINY / "hf_oracle.npz")["fp32.greedy"][0].tolist()
    (new,) = generate(model, expected[:12], max_new_tokens=48, eos_ids=())
    assert new == expected[12:]


# Greedy continuation of "Once upon a time" in float32; the nearest tie is 0.011 apart.
ONCE_UPON_A_TIME = [47, 78, 319, 683, 258, 596]
# fmt: off
CONTINUATION = [
    12, 281, 261, 280, 586, 279, 261, 280, 586, 12, 281, 261, 280, 586, 279, 261, 280, 383, 308,
    83, 279, 261, 280, 383, 308, 83, 12, 261, 280, 383, 308, 83, 279, 261, 280, 383, 308, 83, 12,
    261,
]
# fmt: on


def test_mini_generates_the_same_tokens_everywhere(implementation):
    model = GptOss.from_pretrained(mini_path(), jnp.float32, implementation)
    assert generate(model, ONCE_UPON_A_TIME, max_new_tokens=40) == [CONTINUATION]


def test_mini_continues_text(tokenizer):
    assert tokenizer.encode("Once upon a time").ids == ONCE_UPON_A_TIME
    assert tokenizer.decode(ONCE_UPON_A_TIME + CONTINUATION[:21]) == (
        "Once upon a time, and the fire of the fire, and the fire of the forests of"
    )


def test_greedy_tokens_follow_from_the_full_forward_pass(model):
    (new,) = generate(model, PROMPT, max_new_tokens=16)
    logits = np.asarray(model(np.array([PROMPT + new])))[0]
    top = np.sort(logits, axis=-1)
    assert (top[:, -1] - top[:, -2])[2:-1].min() > 1e-3, "a near tie: choose another prompt"
    assert new == logits.argmax(-1)[2:-1].tolist()


def test_ragged_prompts_equal_single_prompts(model):
    prompts = [[5], [10, 200, 3, 77, 400, 12, 9], list(range(100, 116))]
    together = generate(model, prompts, max_new_tokens=16)
    assert together == [generate(model, [prompt], max_new_tokens=16)[0] for prompt in prompts]


def test_sampling_is_reproducible_by_key(model):
    options = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.95}
    first, again, other = (
        generate(model, PROMPT, key=jax.random.key(seed), **options) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_rows_draw_independently_and_like_a_batch_of_one(model):
    options = {"max_new_tokens": 16, "temperature": 1.0, "key": jax.random.key(7)}
    single = generate(model, [PROMPT], **options)
    batch = generate(model, [PROMPT, PROMPT], **options)
    assert batch[0] == single[0]
    assert batch[0] != batch[1]


def test_a_tiny_nucleus_is_greedy(model):
    (expected,) = generate(model, PROMPT, max_new_tokens=16)
    for options in ({"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1e-6, "top_p": 1.0}):
        assert generate(model, PROMPT, max_new_tokens=16, key=jax.random.key(0), **options) == [
            expected
        ]


def test_stops_at_the_end_token(model):
    (free,) = generate(model, PROMPT, max_new_tokens=16, eos_ids=())
    end = free[5]
    (ended,) = generate(model, PROMPT, max_new_tokens=16, eos_ids=[end])
    assert ended == free[: free.index(end) + 1]


def test_end_tokens_come_from_the_configuration(model):
    assert model.config.eos_token_ids == (0,)
    (free,) = generate(model, PROMPT, max_new_tokens=16, eos_ids=())
    config = dataclasses.replace(model.config, eos_token_ids=(free[3],))
    (ended,) = generate(dataclasses.replace(model, config=config), PROMPT, max_new_tokens=16)
    assert ended == free[: free.index(free[3]) + 1]


def test_stream_shows_each_new_token_and_none_after_the_end(model):
    prompts = [PROMPT, [5]]
    free = generate(model, prompts, max_new_tokens=16, eos_ids=())
    end = free[0][2]
    assert end not in free[1]
    steps: list[list[int | None]] = []
    ended = generate(model, prompts, max_new_tokens=16, eos_ids=[end], stream=steps.append)
    length = free[0].index(end) + 1
    assert ended == [free[0][:length], free[1]]
    assert [row[0] for row in steps] == free[0][:length] + [None] * (16 - length)
    assert [row[1] for row in steps] == free[1]


def test_stops_early_when_all_sequences_have_ended(model):
    (free,) = generate(model, PROMPT, max_new_tokens=16, eos_ids=())
    steps = []
    generate(model, PROMPT, max_new_tokens=16, eos_ids=free[:1], stream=steps.append)
    assert steps == [[free[0]]]


def test_steps_are_launched_before_tokens_are_read(model, monkeypatch):
    """The device never waits for the host to look at a token."""
    events = []

    def advance(*args, **kwargs):
        events.append("launch")
        return launched(*args, **kwargs)

    launched = generation.advance
    monkeypatch.setattr(generation, "advance", advance)
    generate(model, PROMPT, max_new_tokens=16, eos_ids=(), stream=lambda _: events.append("read"))
    assert events.index("read") == generation._AHEAD
    assert (events.count("launch"), events.count("read")) == (15, 16)


def test_a_step_takes_over_the_memory_of_its_state(model):
    """Same addresses in every step, or a CUDA graph would have to be updated."""
    options = generation.Options(jax.random.split(jax.random.key(0), 1), None, None, jnp.array([0]))
    padded = np.zeros((1, 16), np.int32)
    padded[0, :3] = PROMPT
    logits, cache = model.prefill(padded, [3], model.init_cache(1, 32))
    state = generation.start(logits, cache, options)

    def addresses(state) -> list[int]:
        return sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state))

    before = addresses(state)
    static = {"config": model.config, "implementation": model.implementation}
    for _ in range(2):
        state = generation.advance(model.params, state, options, **static)
        assert addresses(state) == before


def test_long_prompts_are_processed_in_chunks(model, monkeypatch):
    prompts = [list(range(100, 130)), [5, 6, 7]]
    expected = generate(model, prompts, max_new_tokens=2)
    monkeypatch.setattr(generation, "_CHUNK_TOKENS", 32)  # 16 of each prompt
    assert generate(model, prompts, max_new_tokens=2) == expected


def test_the_cache_grows_with_the_sequences(model, monkeypatch):
    """From less than the window of 32 to more, and once where it is full."""
    expected = generate(model, PROMPT, max_new_tokens=34, eos_ids=())
    monkeypatch.setattr(generation, "_FIRST_CACHE", 16)
    assert generate(model, PROMPT, max_new_tokens=34, eos_ids=()) == expected


def test_programs_are_shared_by_prompts_of_similar_length(model, caplog):
    def compiled(prompt: list[int], max_new_tokens: int) -> list[str]:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            generate(model, prompt, max_new_tokens=max_new_tokens)
        messages = [record.getMessage() for record in caplog.records]
        return [message for message in messages if message.startswith("Compiling")]

    generate(model, PROMPT, max_new_tokens=16)
    for prompt in ([1, 2], list(range(9)), [4] * 16):
        assert not compiled(prompt, 15)
    assert compiled([1, 2], 40)


@pytest.mark.parametrize(
    "form", [np.array, jnp.array, tuple, lambda p: [p], lambda p: np.array([p])]
)
def test_forms_of_a_prompt(model, form):
    assert generate(model, form(PROMPT), max_new_tokens=16) == generate(
        model, PROMPT, max_new_tokens=16
    )


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "tokens: expected at least one prompt"),
        (
            [[1], []],
            {},
            r"tokens: expected prompts of at least one token, found shape \[0\] for pr",
        ),
        ([[1, 1024]], {}, "tokens: expected ids from 0 to 1023, found 1024"),
        ([[-1]], {}, "tokens: expected ids from 0 to 1023, found -1"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        (PROMPT, {"max_new_tokens": 131070}, "expected at most 131069 after a prompt of 3"),
        (PROMPT, {"temperature": -1.0}, "temperature: expected 0 or a positive number"),
        (PROMPT, {"temperature": float("nan")}, "temperature: expected 0 or a positive number"),
        (PROMPT, {"temperature": float("inf")}, "temperature: expected 0 or a positive number"),
        (PROMPT, {"top_p": 0.0}, "top_p: expected above 0 and at most 1, found 0"),
        (PROMPT, {"top_p": 1.5}, "top_p: expected above 0 and at most 1, found 1.5"),
        (PROMPT, {"temperature": 1.0}, r"key: expected a jax\.random\.key"),
    ],
)
def test_bad_arguments(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize("tokens", [[1.5], [[True]], 7])
def test_tokens_that_are_no_integers(model, tokens):
    with pytest.raises(TypeError, match="tokens: expected"):
        generate(model, tokens, max_new_tokens=2)


def test_greedy_takes_the_first_of_equals():
    np.testing.assert_array_equal(greedy(jnp.array([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])), [1, 0])


def draws(
    logits: list[float], temperature: float, top_p: float | None, count: int = 4000
) -> np.ndarray:
    """Returns how often each token is drawn, as fractions."""
    rows = jnp.broadcast_to(jnp.array(logits), (count, len(logits)))
    keys = jax.random.split(jax.random.key(3), count)
    nucleus = None if top_p is None else jnp.float32(top_p)
    tokens = sample(rows, keys, jnp.float32(temperature), nucleus)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


PROBABILITIES = np.array([0.1, 0.5, 0.1, 0.3])


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, PROBABILITIES),
        (1.0, None, PROBABILITIES),
        (0.5, 1.0, PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
        # 0.5 is not enough and 0.8 is; of two equally likely tokens the lower id enters first.
        (1.0, 0.75, [0, 5 / 8, 0, 3 / 8]),
        (1.0, 0.85, [1 / 9, 5 / 9, 0, 3 / 9]),
        (1.0, 0.3, [0, 1, 0, 0]),
    ],
)
def test_distribution_of_samples(temperature, top_p, expected):
    found = draws(np.log(PROBABILITIES).tolist(), temperature, top_p)
    # Five standard deviations of a fraction of 4000 draws.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5 * 0.5 / np.sqrt(4000))
    np.testing.assert_array_equal(found[np.equal(expected, 0)], 0)


def test_impossible_tokens_are_never_drawn():
    for top_p in (1.0, None):
        assert draws([0.0, -np.inf, 0.0], 1.0, top_p)[1] == 0


def test_tokenizer_round_trip(tokenizer):
    text = "It was the best of times; naïve 日本."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        load_tokenizer(tmp_path)
    whole = (mini_path() / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[:1000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no tokenizer: Model missing"):
        load_tokenizer(tmp_path)

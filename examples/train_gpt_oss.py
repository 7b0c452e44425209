"""Train a GPT-OSS-shaped model whose experts are MXFP4 in every step, and write it packed.

    python examples/train_gpt_oss.py books.txt.xz held_out.txt trained

Each forward pass rounds the experts to MXFP4, and gradients go straight through the rounding. What
is written at the end is what was trained, bit for bit. By default 10.8 million parameters learn for
four and a half minutes, which is meant for one large GPU: the built-in model `books-11m` was made
like that on an H100, in five and a half minutes in all. `--tiny` is for trying it out on a CPU.
Texts are in UTF-8, the first may be compressed by xz. The vocabulary is that of the built-in model
`mini`, with which the result is compared.
"""

import argparse
import dataclasses
import lzma
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tokenizers import Tokenizer

from jax_mxfp4.models.gpt_oss import GptOss, GptOssConfig, load_params, load_tokenizer, mini_path
from jax_mxfp4.models.gpt_oss.saving import save_params
from jax_mxfp4.models.gpt_oss.training import TrainableGptOss
from jax_mxfp4.validation import LanguageModel, Likelihood, Protocol, likelihood, split
from jax_mxfp4.validation.errors import negative_log_likelihood
from jax_mxfp4.validation.results import machine, protocol_of, write_json
from jax_mxfp4.validation.texts import read_text

BALANCE = 0.01  # weight of the loss that spreads tokens over experts
WARMUP = 0.02  # of the training
REPORTS = 16
LINES = 10_000  # of text that are tokenized at a time


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
      config: shape of the model.
      length: tokens in a sequence.
      batch: sequences in a step.
      chunk: steps that run without the host.
      peak: highest learning rate.
      dropout: share of the embedding and of each block's result that a step leaves out.
      judged: tokens of the held-out text that count; None for all.
    """

    config: GptOssConfig
    length: int = 256
    batch: int = 128
    chunk: int = 50
    peak: float = 2e-3
    dropout: float = 0.1
    judged: int | None = None


FULL = Recipe(
    GptOssConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=4,
        layer_types=("sliding_attention", "full_attention") * 3,
        sliding_window=64,
        eos_token_ids=(0,),
    )
)
TINY = Recipe(
    replace(
        FULL.config,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_experts=4,
        experts_per_token=2,
        layer_types=("sliding_attention", "full_attention"),
        sliding_window=16,
    ),
    length=32,
    batch=8,
    chunk=20,
    peak=1e-2,
    judged=2048,
)


class State(NamedTuple):
    """What a step changes; `model` is a `TrainableGptOss`, a pytree that Optax's types lack."""

    model: Any
    optimizer: optax.OptState
    key: jax.Array


def decays(model: TrainableGptOss) -> Any:
    """Return for each parameter whether it is a matrix: only these shrink."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and not jax.tree_util.keystr(path).endswith("bias"), model
    )


OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.95),
    optax.add_decayed_weights(0.1, mask=decays),
)


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def advance(
    state: State, text: jax.Array, rates: jax.Array, recipe: Recipe
) -> tuple[State, jax.Array]:
    """Take one step for each learning rate.

    Args:
      state: consumed.
      text: uint16 [n], tokens.
      rates: float32 [steps].
      recipe: how.

    Returns:
      The state, and the losses in nats per token, float32 [steps].
    """

    def loss(model: TrainableGptOss, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        place, *masks = jax.random.split(key, 2 + 2 * recipe.config.num_layers)
        starts = jax.random.randint(place, (recipe.batch, 1), 0, text.size - recipe.length)
        index = starts + jnp.arange(recipe.length + 1, dtype=jnp.int32)
        tokens = text[index].astype(jnp.int32)
        remaining = iter(masks)

        def drop(x: jax.Array) -> jax.Array:
            kept = jax.random.bernoulli(next(remaining), 1 - recipe.dropout, x.shape)
            return jnp.where(kept, x / (1 - recipe.dropout), jnp.zeros_like(x))

        logits, balance = model.forward(tokens[:, :-1], drop)
        nats = jnp.mean(negative_log_likelihood(logits, tokens[:, 1:]))
        return nats + np.float32(BALANCE) * balance, nats

    def step(state: State, rate: jax.Array) -> tuple[State, jax.Array]:
        key, used = jax.random.split(state.key)
        gradient, nats = jax.grad(loss, has_aux=True)(state.model, used)
        change, optimizer = OPTIMIZER.update(gradient, state.optimizer, state.model)
        model = jax.tree.map(lambda old, delta: old - rate * delta, state.model, change)
        return State(model, optimizer, key), nats

    return lax.scan(step, state, rates)


class Judge:
    """Scores models that have the vocabulary of the model mini on one text."""

    def __init__(self, path: Path, tokenizer: Tokenizer, recipe: Recipe) -> None:
        """Read the text and cut it into windows."""
        text = read_text(path)
        ids = tokenizer.encode(text.content).ids
        # As long as the sequences that the models learned from. They overlap, so that every token
        # but the first of the text is scored, once.
        protocol = Protocol(window=256, stride=128, max_tokens=recipe.judged)
        self._windows = split(ids, protocol)
        self._batch = 64 if recipe.judged is None else 4
        self.protocol = protocol_of(text, len(ids), protocol, self._windows)
        self.scored = tokenizer.decode(ids[1 : 1 + self._windows.num_scored])

    def score(self, model: LanguageModel) -> Likelihood:
        """Return how well `model` predicts the text."""
        return likelihood(model, self._windows, self._batch)

    def row(self, name: str, model: LanguageModel) -> dict[str, Any]:
        """Return and print the score, also in units that do not depend on the vocabulary."""
        score = self.score(model)
        nats = score.mean * score.tokens
        row = {
            "model": name,
            "perplexity": score.perplexity,
            "perplexity_per_character": math.exp(nats / len(self.scored)),
            "bits_per_byte": nats / math.log(2) / len(self.scored.encode()),
        }
        print(
            f"{name:20} perplexity {score.perplexity:.3f} per token, "
            f"{row['perplexity_per_character']:.4f} per character, "
            f"{row['bits_per_byte']:.4f} bits per byte",
            flush=True,
        )
        return row


def train(
    state: State,
    text: np.ndarray,
    recipe: Recipe,
    judge: Judge,
    minutes: float,
    steps: int | None,
) -> tuple[TrainableGptOss, dict[str, Any]]:
    """Train for so many minutes, or steps, and return the model and how long it took."""
    print(f"untrained: held-out perplexity {judge.score(state.model).perplexity:.2f}", flush=True)
    tokens = jax.device_put(text)
    run = advance.lower(state, tokens, np.zeros(recipe.chunk, np.float32), recipe).compile()
    done, seconds, progress, reports = 0, 0.0, 0.0, 0
    # Minutes are known to be over only when they are: the rates of a chunk assume that it takes as
    # long as the one before.
    ahead = recipe.chunk / steps if steps else 0.0
    while progress < 1:
        begin = time.perf_counter()
        times = np.minimum(progress + ahead * np.arange(recipe.chunk) / recipe.chunk, 1)
        rates = recipe.peak * np.minimum(times / WARMUP, (1 - times) / (1 - WARMUP))
        state, losses = run(state, tokens, rates.astype(np.float32))
        loss = float(jnp.mean(losses))  # waits for the device
        seconds += time.perf_counter() - begin
        done += recipe.chunk
        reached = done / steps if steps else seconds / (60 * minutes)
        ahead, progress = reached - progress, reached
        if progress >= (reports + 1) / REPORTS:
            reports = int(progress * REPORTS)
            seen = done * recipe.batch * recipe.length
            perplexity = judge.score(state.model).perplexity
            print(
                f"step {done}, {seconds:.0f} s, {seen / seconds:,.0f} tokens/s, "
                f"{seen / text.size:.1f} epochs: loss {loss:.3f}, "
                f"held-out perplexity {perplexity:.2f}",
                flush=True,
            )
    return state.model, {
        "steps": done,
        "tokens": done * recipe.batch * recipe.length,
        "training_seconds": round(seconds, 1),
    }


def require_same(path: Path, model: TrainableGptOss) -> None:
    """Fail unless the checkpoint `path` has the weights that were trained, bit for bit."""
    stored = load_params(path, model.config, jnp.bfloat16)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), stored, model.packed())
    if not all(jax.tree.leaves(same)):
        raise SystemExit(f"{path}: what was read differs from what was trained: {same}")


def read_tokens(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of a text, uint16 [n]."""
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    lines = text.splitlines(keepends=True)
    batches = (
        tokenizer.encode_batch(lines[first : first + LINES])
        for first in range(0, len(lines), LINES)
    )
    return np.concatenate([np.array(e.ids, np.uint16) for batch in batches for e in batch])


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, writes and compares."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path, help="text to learn from, perhaps compressed (.xz)")
    parser.add_argument("held_out", type=Path, help="text to judge by, no part of the other")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--minutes", type=float, default=4.5, help="of training alone")
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--peak", type=float, help="highest learning rate")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists already")
    recipe = TINY if arguments.tiny else FULL
    given = {"peak": arguments.peak, "dropout": arguments.dropout}
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})

    begin = time.perf_counter()
    tokenizer = load_tokenizer(mini_path())
    judge = Judge(arguments.held_out, tokenizer, recipe)
    text = read_tokens(arguments.text, tokenizer)
    # CPUs compute faster in float32.
    dtype = jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    key = jax.random.key(arguments.seed, impl="rbg")  # fast on GPUs
    model: Any = jax.jit(partial(TrainableGptOss.init, recipe.config, dtype=dtype))(key)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"{parameters:,} parameters, {text.size:,} tokens of text", flush=True)
    state = State(model, OPTIMIZER.init(model), key)
    model, effort = train(state, text, recipe, judge, arguments.minutes, arguments.steps)
    save_params(
        arguments.output,
        model.packed(),
        recipe.config,
        (mini_path() / "tokenizer.json").read_text(encoding="utf-8"),
    )
    require_same(arguments.output, model)

    written, mini = (
        GptOss.from_pretrained(path, dtype) for path in (arguments.output, mini_path())
    )
    rows = [
        judge.row("as it was trained", model),
        {**judge.row("as it was written", written), "bytes": folder_bytes(arguments.output)},
        {**judge.row("mini", mini), "bytes": folder_bytes(mini_path())},
    ]
    seconds = time.perf_counter() - begin
    print(f"{rows[1]['bytes']:,} bytes in {arguments.output}; {seconds:.0f} s in all")
    if arguments.json is not None:
        head = {
            **machine(),
            "dtype": dtype.name,
            "parameters": parameters,
            "text": arguments.text.name,
            "text_tokens": text.size,
            "recipe": dataclasses.asdict(recipe),
            "seed": arguments.seed,
            **effort,
            "seconds": round(seconds, 1),
            "held_out": judge.protocol,
        }
        write_json(arguments.json, head, rows)


def folder_bytes(path: Path) -> int:
    """Return the size of what a model needs: weights, configuration and tokenizer."""
    needed = (file for file in path.iterdir() if file.suffix in (".json", ".safetensors"))
    return sum(file.stat().st_size for file in needed)


if __name__ == "__main__":
    main()

"""Compares this package with transformers on a GPT-OSS model of real layer width.

    python tests/real_width.py                 (about 7 GB of memory, 3.3 GB in --folder)
    python tests/real_width.py --tiny          (seconds, any machine)

Needs PyTorch and transformers. A random model of two layers with the sizes of gpt-oss-20b is
written in Hugging Face's layout; transformers dequantizes it and computes float32 logits on the
CPU, this package computes them on the device that JAX uses. Prints one line of JSON; exit status 1
where a bound is exceeded: float32 logits within 1e-3; bfloat16 logits, with the experts that
transformers chose, at a median cosine of 0.999 and at least 0.99. What is printed beside these
tells inexact products from a choice of experts that came out otherwise.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mxfp4.models.gpt_oss import GptOss, GptOssConfig, Params
from jax_mxfp4.models.gpt_oss.forward import Captures
from jax_mxfp4.models.gpt_oss.released import random_params, released_config
from jax_mxfp4.models.gpt_oss.saving import save_params

LARGEST_DIFFERENCE = 1e-3
MEDIAN_COSINE, LEAST_COSINE = 0.999, 0.99
TOKENS = (2, 160)  # longer than the window


def main(arguments: list[str] | None = None) -> int:
    """Compare and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint, for a while")
    parser.add_argument("--implementation", choices=["cuda", "reference"], default=None)
    args = parser.parse_args(arguments)
    config = two_layers(args.tiny)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch) / "checkpoint"
        save_params(folder, random_weights(config), config)
        expected, experts = transformers_logits(folder, tokens)
        found = {
            dtype: GptOss.from_pretrained(folder, dtype, args.implementation)
            for dtype in ("float32", "bfloat16")
        }
        exact, captures = found["float32"].forward(tokens, capture=True)
        logits = np.asarray(exact)
        forced = np.asarray(found["bfloat16"].forward(tokens, router_indices=experts))
        routed_alike = np.asarray(found["float32"].forward(tokens, router_indices=experts))
    report = judge(expected, logits, forced)
    report |= {
        **routing(captures, experts),
        "difference_if_routed_alike": float(np.abs(routed_alike - expected).max()),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "implementation": args.implementation,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "tokens": list(TOKENS),
    }
    print(json.dumps(report))
    return 0 if report["passed"] else 1


def two_layers(tiny: bool) -> GptOssConfig:
    """A sliding and a full layer of gpt-oss-20b, or small ones."""
    config = released_config("20b")
    config = replace(config, layer_types=config.layer_types[:2])
    if not tiny:
        return config
    return replace(
        config,
        vocab_size=512,
        hidden_size=96,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        eos_token_ids=(),
    )


def random_weights(config: GptOssConfig) -> Params:
    """`random_params`, with the gain of gpt-oss-20b's matrices at any width, and larger sinks."""
    gain = (released_config("20b").hidden_size / config.hidden_size) ** 0.5

    def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        is_matrix = leaf.ndim == 2 and leaf.dtype != jnp.uint8
        factor = 50 if path[-1].name == "sinks" else gain if is_matrix else 1
        return leaf if factor == 1 else leaf * jnp.asarray(factor, leaf.dtype)

    return jax.tree_util.tree_map_with_path(scale, random_params(config))


def transformers_logits(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Float32 logits [B, T, V] and each layer's experts [B * T, k], computed on the CPU."""
    import torch
    from transformers import GptOssForCausalLM, Mxfp4Config

    model = GptOssForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
        device_map="cpu",
    )
    model.float()  # transformers 5.17 leaves dequantized experts in bfloat16
    experts: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.mlp.router.register_forward_hook(
            lambda module, inputs, outputs: experts.append(outputs[-1].numpy().astype(np.int32))
        )
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy(), experts


def routing(captures: Captures, experts: list[np.ndarray]) -> dict[str, Any]:
    """How often float32 chose other experts than transformers, and how close the closest choice is.

    One choice that differs changes its token's logits by about 1, however small the error was.
    """
    chosen = [
        np.asarray(layer["router_indices"]).reshape(found.shape)
        for layer, found in zip(captures, experts, strict=True)
    ]
    ranked = [-np.sort(-np.asarray(layer["router_logits"]), axis=-1) for layer in captures]
    count = experts[0].shape[-1]
    return {
        "routed_otherwise": sum(
            int((np.sort(ours) != np.sort(theirs)).any(axis=-1).sum())
            for ours, theirs in zip(chosen, experts, strict=True)
        ),
        "closest_choice": float(
            min((layer[..., count - 1] - layer[..., count]).min() for layer in ranked)
        ),
    }


def judge(expected: np.ndarray, logits: np.ndarray, forced: np.ndarray) -> dict[str, Any]:
    """Compare float32 logits, and bfloat16 logits with forced experts, with the expected ones."""
    exact, rounded = expected.astype(np.float64), forced.astype(np.float64)
    norms = np.linalg.norm(exact, axis=-1) * np.linalg.norm(rounded, axis=-1)
    cosine = np.sum(exact * rounded, axis=-1) / norms
    figures = {
        "largest_difference": float(np.abs(logits - exact).max()),
        "largest_logit": float(np.abs(exact).max()),
        "median_cosine": float(np.median(cosine)),
        "least_cosine": float(cosine.min()),
    }
    passed = (
        figures["largest_difference"] <= LARGEST_DIFFERENCE
        and figures["median_cosine"] >= MEDIAN_COSINE
        and figures["least_cosine"] >= LEAST_COSINE
    )
    return {"passed": passed, **figures}


if __name__ == "__main__":
    sys.exit(main())

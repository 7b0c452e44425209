"""The first two layers of the built-in model mini: a real model that compiles in half the time."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_mxfp4.models.gpt_oss import GptOss, mini_path
from jax_mxfp4.models.gpt_oss.saving import save_params

LAYERS = 2


def load(dtype: DTypeLike = jnp.float32) -> GptOss:
    model = GptOss.from_pretrained(mini_path(), dtype, "reference")
    return GptOss(
        replace(model.params, layers=model.params.layers[:LAYERS]),
        replace(model.config, layer_types=model.config.layer_types[:LAYERS]),
        "reference",
    )


def write(folder: Path) -> Path:
    model = load(jnp.bfloat16)
    tokenizer = (mini_path() / "tokenizer.json").read_text(encoding="utf-8")
    save_params(folder, model.params, model.config, tokenizer)
    return folder

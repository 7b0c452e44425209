"""Logits and tokens from llama.cpp, through the `cyllama` package."""

from collections.abc import Sequence
from pathlib import Path

import cyllama.llama.llama_cpp as llama
import numpy as np

_CONTEXT = 512


class _Model(llama.LlamaModel):
    @property
    def n_vocab(self) -> int:  # cyllama 0.2.18 asks its own class for this, which lacks it
        return self.get_vocab().n_vocab


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU, with a float32 cache."""

    def __init__(self, file: Path) -> None:
        llama.disable_logging()
        llama.llama_backend_init()
        parameters = llama.LlamaModelParams()
        parameters.n_gpu_layers = 0
        self._model = _Model(str(file), parameters)

    def tokenize(self, text: str) -> list[int]:
        return self._model.get_vocab().tokenize(text, False, True)

    def logits(self, sequences: np.ndarray) -> np.ndarray:
        """Return float32 [B, T, V] for tokens [B, T]."""
        return np.stack([self._sequence(sequence.tolist()) for sequence in sequences])

    def _sequence(self, tokens: Sequence[int]) -> np.ndarray:
        parameters = llama.LlamaContextParams()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = _CONTEXT
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = parameters.flash_attn_type = 0
        with llama.LlamaContext(self._model, parameters) as context:
            batch = llama.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
            for position, token in enumerate(tokens):
                batch.add(token, position, [0], True)
            context.decode(batch)
            rows = [context.get_logits_ith(i) for i in range(len(tokens))]
        return np.array(rows, np.float32)


def ggml_version() -> str:
    """Return the version of ggml and its commit."""
    return f"{llama.ggml_version()} ({llama.ggml_commit()})"

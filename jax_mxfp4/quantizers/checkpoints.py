"""GPTQ for checkpoints on disk, in the form that `jax_mxfp4.convert` takes."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.checkpoints import (
    CheckpointError,
    GptOssParameters,
    Packer,
    PackingReader,
    has_unpacked_experts,
    is_gguf,
    open_checkpoint,
    read_json_object,
)
from jax_mxfp4.format import BLOCK_BYTES, BLOCK_SIZE
from jax_mxfp4.models.gpt_oss import GptOssConfig, read_config
from jax_mxfp4.models.gpt_oss.params import Layer, layer_of, parameter_specs
from jax_mxfp4.models.llama import Llama
from jax_mxfp4.models.llama.names import stored_names
from jax_mxfp4.quantizers.gpt_oss import calibrate_experts
from jax_mxfp4.quantizers.llama import quantize_llama
from jax_mxfp4.quantizers.options import DEFAULT_OPTIONS, GptqOptions, Progress
from jax_mxfp4.quantizers.store import load_layer

Place = tuple[int, str, tuple[Any, ...]]
"""Where a matrix went: layer, name in the layer's file, index into its leading axes."""


@contextmanager
def calibrated_packer(
    source: str | Path,
    tokens: ArrayLike,
    options: GptqOptions = DEFAULT_OPTIONS,
    *,
    dtype: DTypeLike = jnp.float32,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Iterator[Packer]:
    """Calibrate a checkpoint, and yield what packs its weights::

        with calibrated_packer(source, tokens) as pack:
            convert(source, destination, pack=pack)

    Of GPT-OSS the experts are packed, one layer is read at a time, and what is done is kept on
    disk. Of a Llama the linear layers of the blocks are packed, after the model was read as a
    whole.

    Args:
      source: a GPT-OSS checkpoint in any layout, whose experts are not packed; or a folder of a
        Llama in Hugging Face's layout.
      tokens: calibration text, integers [B, T].
      options: see `GptqOptions`.
      dtype: of the computation: float32, bfloat16 or float16.
      checkpoint: folder in which finished layers are kept, from which a later call goes on; None
        for a temporary one.
      progress: called after each parameter of experts.

    Yields:
      A packer that looks up the result by the name of a matrix.

    Raises:
      CheckpointError: `source` is damaged, of another kind, or packed already.
      ValueError: tokens are no [B, T], or `checkpoint` belongs to another calibration.
    """
    source = Path(source)
    with ExitStack() as stack:
        if checkpoint is None:
            checkpoint = stack.enter_context(tempfile.TemporaryDirectory())
        arguments = {"checkpoint": checkpoint, "progress": progress}
        if _is_llama(source):
            model = Llama.from_pretrained(source, dtype)
            quantize_llama(model, tokens, options, **arguments)
            places = _llama_places(model)
        else:
            experts = _ExpertReader(source, read_config(source), dtype)
            for _ in calibrate_experts(
                experts.embedding(), experts.layer, experts.config, tokens, options, **arguments
            ):
                pass
            places = experts.places
        yield _StoredPacker(Path(checkpoint), places)


def _is_llama(source: Path) -> bool:
    return not is_gguf(source) and read_json_object(source / "config.json").get("model_type") == (
        "llama"
    )


def _llama_places(model: Llama) -> dict[str, Place]:
    places = {}
    for path, name in stored_names(model.config, "huggingface").items():
        if path.startswith("layers.") and path.endswith(".kernel"):
            _, index, parameter = path.removesuffix(".kernel").split(".", 2)
            places[name.removesuffix(".weight")] = (int(index), parameter, (...,))
    return places


class _ExpertReader:
    """Reads layers with dense experts, and remembers under which names their matrices came.

    Attributes:
      config: hyperparameters.
      places: of the matrices that have been read.
    """

    def __init__(self, source: Path, config: GptOssConfig, dtype: DTypeLike) -> None:
        specs = parameter_specs(config)
        reader = open_checkpoint(source, strict=False)
        if not has_unpacked_experts(reader, specs):
            raise CheckpointError(source, "the experts are packed already, nothing is left to pack")
        self._parameters = GptOssParameters(PackingReader(reader, specs, self._capture), specs)
        self.config = config
        self._dtype = dtype
        self._captured: list[tuple[str, np.ndarray]] = []
        self.places: dict[str, Place] = {}

    def embedding(self) -> jax.Array:
        """Return the embedding [V, D]."""
        return jnp.asarray(self._parameters.read("embedding"), self._dtype)

    def layer(self, index: int) -> Layer:
        """Return the parameters of layer `index`; the experts' are NumPy arrays."""

        def read(name: str) -> Any:
            if self._parameters.specs[name].packed:
                return self._experts(index, name)
            return jnp.asarray(self._parameters.read(name), self._dtype)

        return layer_of(self.config, index, read)

    def _experts(self, index: int, name: str) -> np.ndarray:
        """Return a parameter of experts, dense [E, N, K]."""
        self._captured.clear()
        self._parameters.read(name)
        count = self.config.num_experts
        # A GGUF file has the even rows, gates, and the odd ones in tensors of their own.
        halves = len(self._captured) // count
        parts = [self._captured[i * count : (i + 1) * count] for i in range(halves)]
        for number, part in enumerate(parts):
            rows = slice(number, None, halves)
            for expert, (stored_name, _) in enumerate(part):
                self.places[stored_name] = (index, name.rpartition(".")[2], (expert, rows))
        stacked = np.stack([np.stack([matrix for _, matrix in part]) for part in parts], axis=2)
        return stacked.reshape(count, -1, stacked.shape[-1])

    def _capture(self, name: str, matrix: np.ndarray) -> MXFP4Array:
        """Keep a matrix as it is read; the result only has the right shape."""
        self._captured.append((name, matrix))
        groups = (*matrix.shape[:-1], matrix.shape[-1] // BLOCK_SIZE)
        return MXFP4Array(np.zeros((*groups, BLOCK_BYTES), np.uint8), np.zeros(groups, np.uint8))


class _StoredPacker:
    """A `Packer` that reads what calibration left in a folder, a layer at a time."""

    def __init__(self, folder: Path, places: dict[str, Place]) -> None:
        self._folder = folder
        self._places = places
        self._layer: int | None = None
        self._weights: dict[str, MXFP4Array] = {}

    def __call__(self, name: str, matrix: np.ndarray) -> MXFP4Array:
        if name not in self._places:
            raise ValueError(f"{name}: expected a weight that was calibrated, as {self._known()}")
        layer, parameter, part = self._places[name]
        if layer != self._layer:
            self._layer, self._weights = layer, load_layer(self._folder, layer)
        packed = self._weights[parameter][part]
        if packed.shape != matrix.shape:
            raise ValueError(
                f"{name}: expected {list(packed.shape)}, as when it was calibrated, "
                f"found {list(matrix.shape)}"
            )
        return packed

    def _known(self) -> str:
        return ", ".join(list(self._places)[:3]) + ", ..."

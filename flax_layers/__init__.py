"""Flax layers with MXFP4 weights: NNX modules, and `flax_layers.linen` for Linen models."""

from flax_layers.convert import quantize_model
from flax_layers.dense import MXFP4Dense
from flax_layers.embed import MXFP4Embed
from flax_layers.layouts import with_layout
from flax_layers.moe import MXFP4MoE
from flax_layers.report import ModuleReport, QuantizationReport
from flax_layers.variables import MXFP4Weight

__all__ = [
    "MXFP4Dense",
    "MXFP4Embed",
    "MXFP4MoE",
    "MXFP4Weight",
    "ModuleReport",
    "QuantizationReport",
    "quantize_model",
    "with_layout",
]

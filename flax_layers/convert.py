"""Replacing the linear and embedding layers of an NNX model by packed ones."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike

from flax_layers.dense import MXFP4Dense
from flax_layers.embed import MXFP4Embed
from flax_layers.moe import MXFP4MoE
from flax_layers.report import ModuleReport, QuantizationReport
from flax_layers.traversal import Site, children, find_sites
from flax_layers.variables import FLOAT_DTYPES, check_float_dtype
from jax_mxfp4.array import BLOCK_SIZE, MXFP4Array
from jax_mxfp4.ops import Implementation, dequantize
from jax_mxfp4.quantize import SCALE_RULES, ScaleRule

Options = Mapping[str, Any]
Rules = str | Sequence[tuple[str, Options | Literal[False] | None]]
Model = TypeVar("Model", bound=nnx.Module)

_OPTION_NAMES = ("scale_rule", "dtype", "implementation")
_PACKED_TYPES = (MXFP4Dense, MXFP4Embed, MXFP4MoE)
# These modules rewrite the kernel of the layer they hold on every call.
_KERNEL_WRITERS = (nnx.WeightNorm, nnx.SpectralNorm)


def quantize_model(
    model: Model,
    rules: Rules,
    *,
    scale_rule: ScaleRule = "even",
    dtype: DTypeLike | None = None,
    implementation: Implementation = None,
) -> tuple[Model, QuantizationReport]:
    """Packs the `nnx.Linear` and `nnx.Embed` modules of a model to MXFP4.

    The given model is not changed. The new one shares its arrays, but no variables, and has
    `MXFP4Dense` and `MXFP4Embed` in place of the modules that matched. References stay as they
    were: a module used in several places is packed once and remains one object. Abstract models
    (`nnx.eval_shape`) give abstract packed models, and stacks of layers made by `nnx.vmap` along
    axis 0 give stacks of packed layers.

    Modules are named by the attribute names and indices that lead to them, joined by dots, as in
    "decoder.layers.0.mlp.up"; a rule must match the whole path (`re.fullmatch`). Rules are tried
    in turn on every module that holds parameters, and the first match decides. A match that
    cannot be packed is left as it is and reported with the reason: a subclass (it may use its
    kernel in another way), another kind of module, a size that is not a multiple of 32.

    Args:
      model: an NNX module.
      rules: a regular expression for the modules to pack, or a sequence of (regular expression,
        options) pairs. Options override the keywords below by name for what their expression
        matches; None or False leaves those modules alone.
      scale_rule: how block scales are chosen, see `jax_mxfp4.quantize`.
      dtype: of the computation of packed layers; None keeps that of the original layer.
      implementation: "cuda", "reference" or None, see `jax_mxfp4.matmul`.

    Returns:
      The new model and a report; `print(report)` shows a table.

    Raises:
      TypeError: `model` or `rules` is of another kind, or `dtype` is another type.
      ValueError: an expression is malformed or matches nothing, or an option is unknown.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}")
    defaults = {"scale_rule": scale_rule, "dtype": dtype, "implementation": implementation}
    compiled = _compile(rules, defaults)

    new_model = nnx.clone(model, graph=True)
    copies = {
        path: site.module
        for site in find_sites(new_model, stop_at=_PACKED_TYPES)
        for path in site.paths
    }
    sites = find_sites(model, stop_at=_PACKED_TYPES)  # a clone loses the order of attributes
    for pattern, _ in compiled:
        if not any(pattern.fullmatch(path) for site in sites for path in site.paths):
            known = ", ".join(site.paths[0] or '""' for site in sites[:8])
            raise ValueError(
                f"rule {pattern.pattern!r} matches no module that holds parameters and is not "
                f"packed already; there are {len(sites)}: {known}{', ...' * (len(sites) > 8)}"
            )

    entries = []
    for site in sites:
        for pattern, options in compiled:
            if any(pattern.fullmatch(path) for path in site.paths):
                entries.append(_apply(copies[site.paths[0]], site, options))
                break
    before, after = (_nbytes(nnx.state(m, graph=True)) for m in (model, new_model))
    return new_model, QuantizationReport(tuple(entries), before, after)


def _compile(rules: Rules, defaults: Options) -> list[tuple[re.Pattern[str], Options | None]]:
    """Checks the rules; options become complete, and None where modules are left alone."""
    pairs = [(rules, {})] if isinstance(rules, str) else rules
    if not isinstance(pairs, Sequence) or not pairs:
        raise TypeError(
            "rules must be a regular expression or a sequence of (regular expression, options), "
            f"got {rules!r}"
        )
    compiled: list[tuple[re.Pattern[str], Options | None]] = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"a rule must be (regular expression, options), got {pair!r}")
        expression, options = pair
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise ValueError(f"rule {expression!r} is not a regular expression: {error}") from error
        if options is None or options is False:
            compiled.append((pattern, None))
            continue
        if not isinstance(options, Mapping):
            raise TypeError(f"rule {expression!r}: options must be a dict, None or False")
        if unknown := sorted(set(options) - set(_OPTION_NAMES)):
            raise ValueError(
                f"rule {expression!r}: unknown options {unknown}, expected {list(_OPTION_NAMES)}"
            )
        options = {**defaults, **options}
        if options["scale_rule"] not in SCALE_RULES:
            raise ValueError(
                f"scale_rule must be one of {', '.join(SCALE_RULES)}, got {options['scale_rule']!r}"
            )
        check_float_dtype("dtype", options["dtype"])
        compiled.append((pattern, options))
    return compiled


def _apply(module: nnx.Module, site: Site, options: Options | None) -> ModuleReport:
    """Packs `module`, the copy of the one at `site`, in place if it can be packed."""
    kernel = getattr(module, "embedding" if isinstance(module, nnx.Embed) else "kernel", None)
    shape = tuple(kernel.shape) if isinstance(kernel, nnx.Variable) else None
    action: Literal["packed", "kept", "excluded"]
    reason, sqnr_db = "", None
    kind, bytes_before = type(module).__name__, _own_bytes(module)
    if options is None:
        action = "excluded"
    elif reason := _obstacle(site):
        action = "kept"
    else:
        action = "packed"
        sqnr_db = _pack_in_place(module, options)
    return ModuleReport(
        path=site.paths[0],
        aliases=tuple(site.paths[1:]),
        kind=kind,
        shape=shape,
        action=action,
        reason=reason,
        bytes_before=bytes_before,
        bytes_after=_own_bytes(module),
        sqnr_db=sqnr_db,
    )


def _obstacle(site: Site) -> str:
    """Returns why the module of `site` cannot be packed, or ""."""
    module = site.module
    if type(module) is nnx.Linear:
        if module.dot_general is not lax.dot_general:
            return "it has its own dot_general"
        kernel, name, size = module.kernel, "in_features", module.in_features
        shape = (module.in_features, module.out_features)
    elif type(module) is nnx.Embed:
        kernel, name, size = module.embedding, "features", module.features
        shape = (module.num_embeddings, module.features)
    elif isinstance(module, nnx.Linear | nnx.Embed):
        return "a subclass may use its kernel in another way"
    else:
        return "there is no packed form of this module"
    if module.promote_dtype is not promote_dtype:
        return "it has its own promote_dtype"
    for parent in (parent for parents in site.parents for parent in parents):
        if isinstance(parent, _KERNEL_WRITERS):
            return f"its kernel is rewritten by {type(parent).__name__}"
    if any(key.startswith("on_") and hook for key, hook in kernel.get_metadata().items()):
        return "its kernel has Variable hooks"
    if kernel.dtype not in FLOAT_DTYPES:
        return f"its kernel has dtype {kernel.dtype}"
    if module.dtype is not None and jnp.dtype(module.dtype) not in FLOAT_DTYPES:
        return f"it computes in {jnp.dtype(module.dtype)}"
    if tuple(kernel.shape[-2:]) != shape:
        return f"its kernel has shape {tuple(kernel.shape)}, which does not end in {shape}"
    if size % BLOCK_SIZE:
        return f"{name}={size} is not a multiple of {BLOCK_SIZE}"
    return ""


def _pack_in_place(module: nnx.Module, options: Options) -> float | None:
    """Turns `module` into its packed form and returns the SQNR, None for abstract weights.

    The object itself becomes the packed one, so every reference to it follows: attributes, lists,
    tuples, dictionaries, ties between modules, and the root of the model.
    """
    if isinstance(module, nnx.Linear):
        packed = MXFP4Dense.from_linear(module, **options)
        if module.bias is not None:
            packed.bias = module.bias  # the same Variable, which may be tied to another one
        kernel, weight = module.kernel.get_value(), packed.weight
    else:
        assert isinstance(module, nnx.Embed)
        packed = MXFP4Embed.from_embed(module, **options)
        kernel, weight = module.embedding.get_value(), packed.embedding
    sqnr_db = None
    if not isinstance(kernel, jax.ShapeDtypeStruct | jax.core.Tracer):
        original = jnp.matrix_transpose(kernel) if isinstance(module, nnx.Linear) else kernel
        sqnr_db = _sqnr_db(original, weight)
    object.__setattr__(module, "__class__", type(packed))
    vars(module).clear()
    vars(module).update(vars(packed))
    return sqnr_db


def _sqnr_db(original: jax.Array, packed: MXFP4Array) -> float:
    original = original.astype(jnp.float32)
    decoded = dequantize(packed, jnp.float32, implementation="reference")
    noise = float(jnp.sum(jnp.square(original - decoded)))
    signal = float(jnp.sum(jnp.square(original)))
    return 10 * math.log10(signal / noise) if noise else math.inf


def _nbytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree, abstract ones included."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _own_bytes(module: nnx.Module) -> int:
    """Bytes of the variables that are attributes of `module` itself."""
    return _nbytes([child for _, child in children(module) if isinstance(child, nnx.Variable)])

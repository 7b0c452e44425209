"""The public operations: argument checks, platform choice, batching and gradients.

Every operation is ``custom_vjp(custom_vmap(platform_dependent(cuda=kernel, default=reference)))``:

* the platform is chosen when a program is lowered, so one trace serves CPU, CUDA and export;
* `jax.vmap` folds the batch into rows of one call and never copies a shared weight; only batched
  *weights* or biases cost one call per batch item, through `jax.lax.map`;
* reverse mode keeps packed weights. Packed weights themselves are constants: their cotangents are
  zero. Forward mode (`jax.jvp`) through `matmul` and `moe` is not available.

The argument ``implementation`` of each operation is one of

* None: the CUDA kernel where the program runs on CUDA and this installation has kernels, the
  definition in `jax_mxfp4.reference` everywhere else;
* "reference": the definition, on every platform;
* "cuda": the kernel. RuntimeError when this installation has none, or when the program is compiled
  for another platform; never a fallback.

Packed weights may have either layout (see `MXFP4Array`), and results do not depend on it. What the
canonical one costs on CUDA is said at `matmul` and `moe`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.sharding import AbstractMesh
from jax.typing import ArrayLike, DTypeLike

from jax_mxfp4 import ffi, reference
from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.block_layouts import Tree, convert_arrays
from jax_mxfp4.format import BlockLayout

Implementation = Literal["cuda", "reference"] | None

_FLOATS = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def dequantize(
    w: MXFP4Array, dtype: DTypeLike = jnp.bfloat16, *, implementation: Implementation = None
) -> Array:
    """Decode a packed array exactly.

    Args:
      w: packed array [..., K], K > 0.
      dtype: float32, bfloat16 or float16. The first two hold every finite value exactly; float16
        rounds to nearest even, overflows to infinity and underflows gradually.
      implementation: see the module's docstring.

    Returns:
      `dtype` [..., K].

    Raises:
      TypeError: `w` is no MXFP4Array, or `dtype` is another dtype.
      ValueError: K is 0, or `implementation` is unknown.
      RuntimeError: `implementation` is "cuda" and cannot be had.
    """
    backend = _backend(implementation)
    _check_weight("w", w)
    return _dequantize_op(backend, _float_dtype("dtype", dtype))(w)


def take(
    w: MXFP4Array,
    ids: ArrayLike,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation = None,
) -> Array:
    """Decode rows of a packed table, as an embedding lookup does.

    Ids follow the default mode of `jnp.take`: -V..-1 count from the end, and any other id outside
    0..V-1 gives a row of NaN.

    Args:
      w: packed table [V, K], K > 0.
      ids: integers of any dtype and shape.
      dtype: float32, bfloat16 or float16.
      implementation: see the module's docstring.

    Returns:
      `dtype` ids.shape + [K].

    Raises:
      TypeError: `w` is no MXFP4Array, `ids` are not integers, or `dtype` is another dtype.
      ValueError: `w` is not two-dimensional, K is 0, or `implementation` is unknown.
      RuntimeError: `implementation` is "cuda" and cannot be had.
    """
    backend = _backend(implementation)
    _check_weight("w", w, "[V, K]")
    rows, width = w.shape
    ids = _int32_ids("ids", ids, rows)
    op = _take_op(backend, _float_dtype("dtype", dtype))
    flat = ids.reshape(math.prod(ids.shape))
    return op(*_vary_alike(w, flat)).reshape(*ids.shape, width)


def matmul(
    x: ArrayLike,
    w: MXFP4Array,
    *,
    bias: ArrayLike | None = None,
    implementation: Implementation = None,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """Compute ``x @ dequantize(w).T + bias`` without materializing the decoded weight.

    Weights are decoded exactly, products accumulate in float32 (never TF32), the bias is added in
    float32 and the result is rounded once. The order of the sum is the implementation's, fixed
    from run to run. The CUDA kernel splits float32 activations into three bfloat16 terms, which is
    exact but for bits below 2**-133; those are cut off.

    The CUDA kernel reads the prepared layout. A canonical `w` is prepared in the program, before
    the kernel and in every call: one more pass over the packed weight, and memory for it. Call
    `jax_mxfp4.prepare` once, outside of the program, to avoid that. The kernel runs either way.

    Args:
      x: float32, bfloat16 or float16 [..., K].
      w: packed array [N, K], K > 0.
      bias: float32, bfloat16 or float16 [N], or None.
      implementation: see the module's docstring.
      out_dtype: float32, bfloat16 or float16; default x.dtype.

    Returns:
      `out_dtype` [..., N]. Differentiable in `x` and `bias`.

    Raises:
      TypeError: an argument has another type or dtype.
      ValueError: shapes do not fit, K is 0, or `implementation` is unknown.
      RuntimeError: `implementation` is "cuda" and cannot be had.
    """
    backend = _backend(implementation)
    x = _float_array("x", x)
    _check_weight("w", w, "[N, K]")
    outputs, inputs = w.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x must have shape [..., {inputs}] to match w {w.shape}, got {x.shape}")
    bias = _bias("bias", bias, (outputs,))
    out_dtype = x.dtype if out_dtype is None else _float_dtype("out_dtype", out_dtype)
    op = _matmul_op(backend, x.dtype, None if bias is None else bias.dtype, out_dtype)
    y = op(*_vary_alike(x.reshape(math.prod(x.shape[:-1]), inputs), w, bias))
    return y.reshape(*x.shape[:-1], outputs)


def moe(
    x: ArrayLike,
    expert_ids: ArrayLike,
    expert_weights: ArrayLike,
    gate_up: MXFP4Array,
    gate_up_bias: ArrayLike | None,
    down: MXFP4Array,
    down_bias: ArrayLike | None,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    implementation: Implementation = None,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """Apply the GPT-OSS expert layer to routed tokens.

    For each token and each of its k experts e::

        gu   = x @ gate_up[e].T + gate_up_bias[e]            (float32)
        gate = min(gu[0::2], limit)
        up   = clip(gu[1::2], -limit, limit)
        h    = gate * sigmoid(alpha * gate) * (up + 1)       (float32, rounded to x.dtype)
        y_e  = h @ down[e].T + down_bias[e]                  (float32)

    The result is ``sum_j expert_weights[j] * y_{e_j}``, summed in float32 with j ascending and
    rounded once. An id outside 0..E-1 contributes exactly zero, which is what a shard of the
    experts needs. Source: MLPBlock and swiglu in gpt_oss/torch/model.py of openai/gpt-oss.

    The CUDA kernel reads the prepared layout. Canonical experts are prepared in the program, before
    the kernel and in every call: one more pass over all of them, also those that no token is sent
    to, and memory for them. Call `jax_mxfp4.prepare` once, outside of the program, to avoid that.
    The kernel runs either way.

    Args:
      x: float32, bfloat16 or float16 [..., T, D].
      expert_ids: integers [..., T, k].
      expert_weights: float32, bfloat16 or float16 [..., T, k].
      gate_up: packed array [E, 2 * I, D]; row 2i is a gate, row 2i + 1 its linear partner.
      gate_up_bias: float32, bfloat16 or float16 [E, 2 * I], or None.
      down: packed array [E, D, I].
      down_bias: float32, bfloat16 or float16 [E, D], or None.
      alpha: slope inside the sigmoid.
      limit: clamp of the gate (above) and of its linear partner (both sides).
      implementation: see the module's docstring.
      out_dtype: float32, bfloat16 or float16; default x.dtype.

    Returns:
      `out_dtype` [..., T, D]. Differentiable in `x`, `expert_weights` and the biases; the backward
      pass is the definition's on every platform.

    Raises:
      TypeError: an argument has another type or dtype.
      ValueError: shapes do not fit, D or I is 0, or `implementation` is unknown.
      RuntimeError: `implementation` is "cuda" and cannot be had.
    """
    backend = _backend(implementation)
    x = _float_array("x", x)
    _check_weight("gate_up", gate_up, "[E, 2I, D]")
    _check_weight("down", down, "[E, D, I]")
    experts, width, intermediate = down.shape
    if gate_up.shape != (experts, 2 * intermediate, width):
        raise ValueError(
            f"gate_up must have shape [E, 2I, D] = {(experts, 2 * intermediate, width)} to match "
            f"down [E, D, I] = {down.shape}, got {gate_up.shape}"
        )
    if x.ndim < 2 or x.shape[-1] != width:
        raise ValueError(
            f"x must have shape [..., T, {width}] to match down {down.shape}, got {x.shape}"
        )
    ids = _int32_ids("expert_ids", expert_ids, experts)
    if ids.ndim != x.ndim or ids.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"expert_ids must have shape [..., T, k] to match x {x.shape}, got {ids.shape}"
        )
    weights = _float_array("expert_weights", expert_weights)
    if weights.shape != ids.shape:
        raise ValueError(
            f"expert_weights must have the shape of expert_ids {ids.shape}, got {weights.shape}"
        )
    gate_up_bias = _bias("gate_up_bias", gate_up_bias, (experts, 2 * intermediate))
    down_bias = _bias("down_bias", down_bias, (experts, width))
    out_dtype = x.dtype if out_dtype is None else _float_dtype("out_dtype", out_dtype)
    op = _moe_op(backend, float(alpha), float(limit), out_dtype)
    tokens, top_k = math.prod(x.shape[:-1]), ids.shape[-1]
    routing = ids.reshape(tokens, top_k), weights.reshape(tokens, top_k).astype(jnp.float32)
    experts_args = gate_up, gate_up_bias, down, down_bias
    y = op(*_vary_alike(x.reshape(tokens, width), *routing, *experts_args))
    return y.reshape(x.shape)


def prepare_on_cuda(tree: Tree, *, donate: bool = False) -> Tree:
    """Prepare the packed arrays that lie where programs call the CUDA kernels.

    This is for code that makes weights to be computed with, such as layers and loaders. Arrays on
    other platforms stay as they are, and everywhere where this installation has no kernels.
    Tracers, and `jax.ShapeDtypeStruct` without devices, count as on JAX's default device, so that
    what `jax.eval_shape` describes is what would be made. NumPy arrays and those offloaded to the
    host's memory stay as they are.

    Args:
      tree: an `MXFP4Array`, or any pytree that has some.
      donate: see `jax_mxfp4.prepare`.

    Returns:
      `tree`, with these arrays in the prepared layout; see `jax_mxfp4.prepare`.
    """

    def layout_of(w: MXFP4Array) -> BlockLayout:
        return "prepared" if _runs_kernels(w.blocks) else w.layout

    return convert_arrays(tree, layout_of, donate=donate)


def _runs_kernels(leaf: Any) -> bool:
    """Whether programs that `leaf` is an argument of call the kernels, by where it lies."""
    if ffi.why_unavailable() is not None or isinstance(leaf, np.ndarray):
        return False
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if sharding is not None and not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        offloaded = sharding.memory_kind not in (None, "device")
        return not offloaded and all(map(ffi.runs_kernels, sharding.device_set))
    config: Any = jax.config
    default = config.jax_default_device
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return ffi.runs_kernels(default or jax.devices()[0])


# Argument checks ---------------------------------------------------------------------------------


def _backend(implementation: Implementation) -> str:
    """Resolve `implementation` to "reference", "cuda" or "platform" (chosen at lowering)."""
    if implementation is None:
        return "platform" if ffi.why_unavailable() is None else "reference"
    if implementation == "cuda":
        reason = ffi.why_unavailable()
        if reason is not None:
            raise RuntimeError(f'implementation="cuda" is not available: {reason}')
        return "cuda"
    if implementation == "reference":
        return "reference"
    raise ValueError(f'implementation must be "cuda", "reference" or None, got {implementation!r}')


def _float_dtype(name: str, dtype: DTypeLike) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {dtype!r}") from error
    if found not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {found}")
    return found


def _float_array(name: str, value: ArrayLike) -> Array:
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"{name} must be a float32, bfloat16 or float16 array, got {type(value).__name__}"
        )
    # Checked before conversion, which would narrow float64 in silence.
    _float_dtype(f"{name}.dtype", value.dtype)
    return jnp.asarray(value)


def _bias(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    if value is None:
        return None
    bias = _float_array(name, value)
    if bias.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {bias.shape}")
    return bias


def _int32_ids(name: str, ids: ArrayLike, size: int) -> Array:
    """Convert ids to int32; what int32 cannot hold becomes an id that is out of range as well."""
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} must have an integer dtype, got {ids.dtype}")
    limits = jnp.iinfo(ids.dtype)
    if limits.max <= jnp.iinfo(jnp.int32).max:
        return jnp.asarray(ids, jnp.int32)
    outside = ids >= size
    if limits.min < 0:
        outside |= ids < -size
    numpy = jnp if isinstance(ids, jax.Array) else np
    return jnp.asarray(numpy.where(outside, jnp.iinfo(jnp.int32).max, ids).astype(jnp.int32))


def _check_weight(name: str, w: MXFP4Array, layout: str | None = None) -> None:
    """Check type, rank (that of `layout`, such as "[N, K]") and a packed axis that is not empty."""
    if not isinstance(w, MXFP4Array):
        raise TypeError(f"{name} must be an MXFP4Array, got {type(w).__name__}")
    if layout is not None and w.ndim != len(layout.split(",")):
        raise ValueError(f"{name} must have shape {layout}, got {w.shape}")
    if w.shape[-1] == 0:
        raise ValueError(f"the last axis of {name} must not be empty, got shape {w.shape}")


# Operations on normalized arguments --------------------------------------------------------------
#
# Each factory returns one operation for a choice of static arguments. The caches make equal
# choices the same function, so that jax.jit recognizes it.


def _axes_of(args: Any) -> frozenset[Any]:
    """The mesh axes of a surrounding shard_map that any of the arrays varies over."""
    axes = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(args))
    return frozenset[Any]().union(*axes)


def _vary_over(axes: frozenset[Any], value: Any) -> Any:
    """Let every array of `value` vary over these mesh axes."""

    def cast(leaf: Array) -> Array:
        missing = tuple(sorted(axes - _axes_of(leaf), key=str))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, value)


def _vary_alike(*args: Any) -> Any:
    """Inside shard_map, let all arrays vary over the mesh axes that any of them varies over.

    Gradients of a custom_vjp must vary as its arguments do. The transpose of the cast is the sum
    over devices that the gradient of a replicated argument needs.
    """
    return _vary_over(_axes_of(args), args)


def _by_platform(
    backend: str, kernel: Callable[..., Array], definition: Callable[..., Array], *args: Any
) -> Array:
    """Call ``kernel(result, *args)`` or ``definition(*args)``."""
    if backend == "reference":
        return definition(*args)
    # The definition is the authority on the type of the result, which inside shard_map includes
    # the mesh axes it varies over. It is jitted, so it is traced once for all calls alike.
    result = jax.eval_shape(definition, *args)

    def refuse(*args: Any) -> Array:
        return _vary_over(_axes_of(args), ffi.cuda_only(result))

    default = definition if backend == "platform" else refuse
    return lax.platform_dependent(*args, cuda=functools.partial(kernel, result), default=default)


def _definition(function: Callable[..., Array], **options: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(function, **options), inline=True)


def _is_empty(*dimensions: int) -> bool:
    # Symbolic dimensions (jax.export) are never known to be zero.
    return any(isinstance(dimension, int) and dimension == 0 for dimension in dimensions)


def _any_batched(in_batched: Any) -> bool:
    return any(jax.tree.leaves(in_batched))


def _map_over_batch(op: Callable[..., Array], in_batched: Any, args: Any) -> tuple[Array, bool]:
    """Call `op` once per batch item, for batched weights."""
    leaves, tree = jax.tree.flatten(args)
    batched = jax.tree.leaves(in_batched)

    def one(items: list[Array]) -> Array:
        item = iter(items)
        merged = [next(item) if b else leaf for b, leaf in zip(batched, leaves, strict=True)]
        return op(*jax.tree.unflatten(tree, merged))

    mapped = [leaf for b, leaf in zip(batched, leaves, strict=True) if b]
    return lax.map(one, mapped), True


def _batch(axis_size: int, batched: bool, value: Array) -> Array:
    return value if batched else jnp.broadcast_to(value, (axis_size, *value.shape))


def _fold(value: Array) -> Array:
    return value.reshape(value.shape[0] * value.shape[1], *value.shape[2:])


def _without_gradient(op: Callable[..., Array]) -> Callable[..., Array]:
    """Make integer-only `op` differentiable, with zero cotangents.

    JAX would otherwise look for the derivative of the custom call.
    """
    differentiable = jax.custom_vjp(op)
    differentiable.defvjp(
        lambda *args: (differentiable(*args), (None,) * len(args)), lambda nothing, _: nothing
    )
    return differentiable


@functools.cache
def _dequantize_op(backend: str, dtype: np.dtype) -> Callable[[MXFP4Array], Array]:
    definition = _definition(reference.dequantize, dtype=dtype)

    @custom_vmap
    def op(w: MXFP4Array) -> Array:
        if _is_empty(*w.shape):
            return jnp.zeros(w.shape, dtype)
        return _by_platform(backend, ffi.dequantize, definition, w)

    @op.def_vmap
    def _(axis_size: int, in_batched: Any, w: MXFP4Array) -> tuple[Array, bool]:
        # Blocks are independent, so a batch axis is one more leading axis.
        batched = in_batched[0]
        blocks = _batch(axis_size, batched.blocks, w.blocks)
        scales = _batch(axis_size, batched.scales, w.scales)
        return op(MXFP4Array(blocks, scales, w.layout)), True

    return jax.jit(_without_gradient(op), inline=True)


@functools.cache
def _take_op(backend: str, dtype: np.dtype) -> Callable[[MXFP4Array, Array], Array]:
    definition = _definition(reference.take, dtype=dtype)

    @custom_vmap
    def op(w: MXFP4Array, ids: Array) -> Array:
        rows, width = w.shape
        if _is_empty(rows, *ids.shape):
            # No id is in range of an empty table.
            return jnp.full((*ids.shape, width), jnp.nan, dtype)
        return _by_platform(backend, ffi.take, definition, w, ids)

    @op.def_vmap
    def _(axis_size: int, in_batched: Any, w: MXFP4Array, ids: Array) -> tuple[Array, bool]:
        if _any_batched(in_batched[0]):
            return _map_over_batch(op, in_batched, (w, ids))
        return op(w, _fold(ids)).reshape(*ids.shape, w.shape[-1]), True

    return jax.jit(_without_gradient(op), inline=True)


@functools.cache
def _matmul_op(
    backend: str, x_dtype: np.dtype, bias_dtype: np.dtype | None, out_dtype: np.dtype
) -> Callable[[Array, MXFP4Array, Array | None], Array]:
    definition = _definition(reference.matmul, out_dtype=out_dtype)

    @custom_vmap
    def batchable(x: Array, w: MXFP4Array, bias: Array | None) -> Array:
        shape = (x.shape[0], w.shape[0])
        if _is_empty(*shape):
            return jnp.zeros(shape, out_dtype)
        return _by_platform(backend, ffi.matmul, definition, x, w, bias)

    @batchable.def_vmap
    def _(
        axis_size: int, in_batched: Any, x: Array, w: MXFP4Array, bias: Array | None
    ) -> tuple[Array, bool]:
        if _any_batched(in_batched[1:]):
            return _map_over_batch(batchable, in_batched, (x, w, bias))
        return batchable(_fold(x), w, bias).reshape(*x.shape[:2], w.shape[0]), True

    @jax.custom_vjp
    def op(x: Array, w: MXFP4Array, bias: Array | None) -> Array:
        return batchable(x, w, bias)

    def forward(x: Array, w: MXFP4Array, bias: Array | None) -> tuple[Array, MXFP4Array]:
        return op(x, w, bias), w

    def backward(w: MXFP4Array, dy: Array) -> tuple[Array, None, Array | None]:
        # bfloat16 holds every weight exactly; float16 does not, so it is widened.
        dtype = jnp.dtype(jnp.bfloat16 if dy.dtype == jnp.bfloat16 else jnp.float32)
        dx = jnp.dot(
            dy.astype(dtype),
            _dequantize_op(backend, dtype)(w),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        db = None if bias_dtype is None else dy.astype(jnp.float32).sum(axis=0).astype(bias_dtype)
        return dx.astype(x_dtype), None, db

    op.defvjp(forward, backward)
    return jax.jit(op, inline=True)


@functools.cache
def _moe_op(backend: str, alpha: float, limit: float, out_dtype: np.dtype) -> Callable[..., Array]:
    kernel = functools.partial(ffi.moe, alpha=alpha, limit=limit)
    definition = _definition(reference.moe, alpha=alpha, limit=limit, out_dtype=out_dtype)

    @custom_vmap
    def batchable(x: Array, ids: Array, weights: Array, *experts: Any) -> Array:
        if _is_empty(*x.shape, *ids.shape, experts[0].shape[0]):
            return jnp.zeros(x.shape, out_dtype)
        return _by_platform(backend, kernel, definition, x, ids, weights, *experts)

    @batchable.def_vmap
    def _(
        axis_size: int, in_batched: Any, x: Array, ids: Array, weights: Array, *experts: Any
    ) -> tuple[Array, bool]:
        if _any_batched(in_batched[3:]):
            return _map_over_batch(batchable, in_batched, (x, ids, weights, *experts))
        tokens = [
            _fold(_batch(axis_size, batched, value))
            for batched, value in zip(in_batched[:3], (x, ids, weights), strict=True)
        ]
        y = batchable(*tokens, *experts)
        return y.reshape(axis_size, y.shape[0] // axis_size, y.shape[1]), True

    @jax.custom_vjp
    def op(*args: Any) -> Array:
        return batchable(*args)

    def forward(*args: Any) -> tuple[Array, tuple[Any, ...]]:
        return op(*args), args

    def backward(args: tuple[Any, ...], dy: Array) -> tuple[Any, ...]:
        x, ids, weights, gate_up, gate_up_bias, down, down_bias = args

        def of_floats(x: Array, weights: Array, gu_bias: Any, down_bias: Any) -> Array:
            if _is_empty(*x.shape, *ids.shape, down.shape[0]):
                return jnp.zeros(x.shape, out_dtype)
            return definition(x, ids, weights, gate_up, gu_bias, down, down_bias)

        _, transpose = jax.vjp(of_floats, x, weights, gate_up_bias, down_bias)
        dx, dweights, dgate_up_bias, ddown_bias = transpose(dy)
        return dx, None, dweights, None, dgate_up_bias, None, ddown_bias

    op.defvjp(forward, backward)
    return jax.jit(op, inline=True)

"""Pack the weights of a Flax NNX model to 4 bits and use it as before."""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_layers import MXFP4Dense, quantize_model

rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(256, 1024, rngs=rngs), nnx.gelu, nnx.Linear(1024, 256, rngs=rngs))
packed, report = quantize_model(model, ".*")  # or rules such as r"layers\.0"; a new model
print(report)

x = jax.random.normal(rngs.params(), (8, 256))
y = nnx.jit(lambda model, x: model(x))(packed, x)
print(f"relative error {jnp.linalg.norm(y - model(x)) / jnp.linalg.norm(model(x)):.3f}")

dense = MXFP4Dense(256, 1024, dtype=jnp.bfloat16, rngs=rngs)  # arguments as those of nnx.Linear
print(dense(x).shape, dense.weight)

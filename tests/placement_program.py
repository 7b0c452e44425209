"""Loads the tiny model onto four CPU devices in every way; `test_placement.py` runs it.

It is a program of its own because the number of devices is fixed when JAX starts.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_mxfp4.array import MXFP4Array
from jax_mxfp4.block_layouts import prepare
from jax_mxfp4.checkpoints import (
    GptOssParameters,
    open_checkpoint,
    place_parameters,
    read_parameters,
)
from jax_mxfp4.models.gpt_oss import GptOss, read_config
from jax_mxfp4.models.gpt_oss.params import parameter_specs

# Parts along every axis, and of every kind of parameter.
SPECS = {
    "embedding": P(None, "x"),
    "unembedding": P(("x", "y")),
    "attention.q.weight": P("x", "y"),
    "attention.k.weight": P("y"),
    "attention.v.bias": P("x"),
    "attention.out.weight": P(None, ("x", "y")),
    "mlp.router.weight": P("x"),
    "mlp.gate_up": P("x", "y"),
    "mlp.gate_up_bias": P("x", "y"),
    "mlp.down": P("y", None, "x"),
}
# Rows 1 and 2 of 4 belong to different halves of what GGUF files store apart.
ODD = {"mlp.gate_up": P(None, ("x", "y")), "mlp.gate_up_bias": P(None, ("y", "x"))}


def place(mesh, specs, name, shape):
    kind = name.split(".", 2)[-1] if name.startswith("layers.") else name
    return NamedSharding(mesh, specs.get(kind, P()))


class Recorder:
    """Parameters that notice how much of each is read at a time."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.specs = parameters.specs
        self.largest = {}

    def stored_bytes(self, name):
        return self.parameters.stored_bytes(name)

    def read(self, name, part=()):
        array = self.parameters.read(name, part)
        self.largest[name] = max(self.largest.get(name, 0), array.nbytes)
        return array


def check_shards(path, mesh, specs):
    wanted = parameter_specs(read_config(path))
    recorder = Recorder(GptOssParameters(open_checkpoint(path), wanted))
    sharding = partial(place, mesh, specs)
    placed = dict(place_parameters(recorder, sharding=sharding))
    donating = partial(prepare, donate=True)
    prepared = dict(place_parameters(recorder, sharding=sharding, prepare=donating))
    for name, expected in read_parameters(open_checkpoint(path), wanted):
        target = sharding(name, expected.shape)
        assert isinstance(placed[name], MXFP4Array) == isinstance(expected, MXFP4Array)
        for leaf, value in zip(
            jax.tree.leaves(placed[name]), jax.tree.leaves(expected), strict=True
        ):
            assert leaf.sharding == target, name
            assert leaf.dtype == value.dtype
            np.testing.assert_array_equal(np.asarray(leaf), value, strict=True)
        if isinstance(expected, MXFP4Array):
            assert prepared[name].layout == "prepared"
            assert prepared[name].blocks.sharding == target, name
            blocks = np.asarray(prepared[name].blocks)
            np.testing.assert_array_equal(blocks, prepare(expected).blocks)
        axes = [axis for entry in target.spec for axis in np.atleast_1d(entry) if axis]
        parts = int(np.prod([mesh.shape[axis] for axis in axes]))
        assert recorder.largest[name] * parts == expected.nbytes, name


def main(paths):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for path in paths:
        check_shards(path, mesh, SPECS)
        check_shards(path, mesh, ODD)

    path = paths[0]
    device = jax.devices()[2]
    for target in (device, jax.sharding.SingleDeviceSharding(device)):
        model = GptOss.from_pretrained(path, np.float32, sharding=target)
        assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(model))
    whole = NamedSharding(mesh, P())
    model = GptOss.from_pretrained(path, np.float32, sharding=whole)
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(model))

    oracle = np.load(path.parent / "hf_oracle.npz")
    sharded = GptOss.from_pretrained(path, np.float32, sharding=partial(place, mesh, SPECS))
    np.testing.assert_allclose(
        sharded(oracle["tokens"]), oracle["fp32.logits"], rtol=1e-4, atol=1e-4
    )

    check_errors(path, mesh)


def check_errors(path, mesh):
    def message(error, sharding):
        try:
            GptOss.from_pretrained(path, sharding=sharding)
        except error as raised:
            return str(raised)
        raise AssertionError(f"{sharding} was taken")

    text = message(ValueError, partial(place, mesh, {"mlp.gate_up": P(None, None, "x")}))
    assert text.startswith("sharding: does not fit 4 parameters\n  - 'layers.0.mlp.gate_up' [8,")
    text = message(ValueError, partial(place, mesh, {"norm": P("x", "y")}))
    assert text.startswith("sharding: does not fit 1 parameters\n  - 'norm' [96]: ")
    assert message(TypeError, "cpu").startswith("sharding: expected a jax.Device, a jax.shard")
    text = message(TypeError, lambda name, shape: P("x"))
    assert text.startswith("sharding of 'embedding': expected a jax.Device, a jax.sharding.Sha")


if __name__ == "__main__":
    assert jax.device_count() == 4
    main([Path(path) for path in sys.argv[1:]])

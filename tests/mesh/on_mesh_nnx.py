"""The optimizer of Flax NNX on a mesh, as in docs/integrations.md."""

from functools import partial

import jax
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_integrations import run

import galore_jax


def test_a_placed_state_is_divided_and_trains_as_on_one_device():
    names = run("flax_nnx")
    tx, (x, y) = names["tx"], names["batches"][0]
    placed = optax.GradientTransformationExtraArgs(partial(galore_jax.init, tx), tx.update)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    values = []
    for on_mesh in (False, True):
        model = nnx.clone(names["model"])
        if on_mesh:
            params = nnx.state(model, nnx.Param)
            shardings = galore_jax.shardings(tx, params, mesh)
            nnx.update(model, jax.device_put(params, shardings))
            x, y = jax.device_put((x, y), NamedSharding(mesh, P("fsdp")))
        with jax.set_mesh(mesh):
            optimizer = nnx.Optimizer(model, placed, wrt=nnx.Param)
            names["new_bases"](model, optimizer, x, y)
            values += [[float(names["projected_step"](model, optimizer, x, y)) for _ in range(3)]]
    for one, other in zip(*values, strict=True):
        assert abs(one - other) < 1e-5
    moments = optax.tree.get(nnx.as_pure(optimizer.opt_state), "mu")["layers"][0]["kernel"].value
    assert moments.shape == (16, 256)
    assert moments.sharding.spec == P(None, "fsdp")

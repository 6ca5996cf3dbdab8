"""When a refresh is tried again, and what it needs of the optimizer and the devices around it."""

import inspect
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax
from galore_jax import apply_gradients, chain, galore, refresh, refresh_due, value_and_grad
from galore_jax.grads.refresh import updates_until_refresh
from galore_jax.optim.galore_state import bases_of, galore_states
from galore_jax.subspace.basis import AGE_UNINITIALIZED

GAP = 16


def experts(params, x, alive):
    """Two experts, of which the second gets tokens or not."""
    one, other = (jnp.tanh(x @ params["experts"][i]) for i in range(2))
    return jnp.mean((one + alive * other) @ params["out"])


def start():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "experts": jax.random.normal(keys[0], (2, 12, 10)),
        "out": jax.random.normal(keys[1], (10, 8)),
    }
    return params, jax.random.normal(keys[2], (6, 12))


def bases(state):
    found = bases_of(galore_states(state, inside_chains=True))
    return {basis.projection.name: basis for basis in found}


def run(params, x, alive, steps):
    """Updates and refreshes; the state, and the steps before which a refresh was due."""
    tx = chain(galore(3, GAP), optax.sgd(1e-3))
    step = jax.jit(
        lambda params, state, alive: apply_gradients(
            tx, value_and_grad(experts)(params, state, x, alive)[1], state, params
        )
    )
    renew = jax.jit(refresh(experts))
    state, tried = tx.init(params), []
    for t in range(steps):
        if refresh_due(state):
            state = renew(params, state, x, alive(t))
            tried.append(t)
        params, state = step(params, state, alive(t))
    return state, tried


def test_a_dead_expert_is_retried_after_twice_as_many_updates_up_to_the_gap():
    params, x = start()
    state, tried = run(params, x, lambda t: 0.0, 5 * GAP)
    # 1, 2, 4, … updates after the start, then every 16; those of the others fall on some of these.
    assert tried == [0, 1, 2, 4, 8, 16, 32, 48, 64]
    alive, dead = np.asarray(bases(state)["experts"].age)
    assert alive == GAP
    assert dead >= AGE_UNINITIALIZED


def test_an_expert_that_wakes_up_gets_its_basis_at_the_next_try():
    params, x = start()
    state, tried = run(params, x, lambda t: jnp.float32(t >= 5), 12)
    assert tried == [0, 1, 2, 4, 8]
    np.testing.assert_array_equal(bases(state)["experts"].age, [12, 4])
    np.testing.assert_array_equal(bases(state)["experts"].wait, [0, 0])


def test_a_kernel_that_the_loss_does_not_use_does_not_keep_the_others_refreshing():
    params, x = start()
    frozen = lambda params, x: experts({**params, "experts": start()[0]["experts"]}, x, 1.0)
    tx = chain(galore(3, GAP), optax.sgd(1e-3))
    state = refresh(frozen)(params, tx.init(params), x)
    assert int(updates_until_refresh(state)) == 1
    assert int(bases(state)["out"].age) == 0


def test_a_convolution_without_a_gradient_does_not_stay_due():
    kernel = jax.random.normal(jax.random.key(0), (3, 12, 16))
    tx = chain(galore(3, GAP), optax.sgd(1e-3))
    state = tx.init({"kernel": kernel})
    for _ in range(3):
        grads = {"kernel": jnp.zeros_like(kernel)}
        _, state = apply_gradients(tx, grads, state, {"kernel": kernel})
    assert not refresh_due(state)
    # A gradient that comes shapes the basis at once, for it costs no pass over the batch.
    _, state = apply_gradients(tx, {"kernel": kernel}, state, {"kernel": kernel})
    np.testing.assert_array_equal(bases(state)["kernel"].age, [1, 1, 1])


def without_extra_arguments(tx):
    """A wrapper that passes on what it knows only."""
    return optax.GradientTransformation(
        tx.init, lambda updates, state, params=None: tx.update(updates, state, params)
    )


@pytest.mark.parametrize(
    "around",
    [
        without_extra_arguments,
        lambda tx: optax.chain(optax.contrib.reduce_on_plateau(), tx),
        lambda tx: chain(tx, optax.contrib.reduce_on_plateau()),
        lambda tx: chain(galore_jax.clip_by_finite_norm(1e-3), tx),
        lambda tx: chain(optax.add_decayed_weights(0.1), tx),
        lambda tx: optax.inject_hyperparams(lambda rate: chain(tx, optax.scale(rate)))(1.0),
        lambda tx: optax.chain(galore(3, GAP), optax.sgd(1e-3)),
    ],
    ids=[
        *("drops extra arguments", "stock, value required", "value required"),
        *("clipped", "decayed", "injected", "stock"),
    ],
)
def test_a_refresh_passes_by_whatever_stands_around_galore(around):
    params, x = start()
    inner = chain(galore(3, GAP), optax.sgd(1e-3))
    tx = around(inner)
    state = refresh(experts)(params, galore_jax.init(tx, params), x, 1.0)
    wanted = refresh(experts)(params, inner.init(params), x, 1.0)
    assert not refresh_due(state)
    for name, basis in bases(state).items():
        for side, vectors in basis.vectors.items():
            np.testing.assert_array_equal(vectors, bases(wanted)[name].vectors[side])


def test_extra_arguments_reach_the_transformation_that_requires_them():
    params, x = start()
    tx = chain(galore(3, GAP), optax.sgd(1e-3), optax.contrib.reduce_on_plateau())
    state = refresh(experts)(params, tx.init(params), x, 1.0)
    value, grads = value_and_grad(experts)(params, state, x, 1.0)
    _, state = apply_gradients(tx, grads, state, params, value=value)
    np.testing.assert_allclose(optax.tree.get(state, "best_value"), value, rtol=1e-6)


def on_four_devices():
    """In shard_map all devices get the coordinates of the whole batch, but no own bases."""
    from functools import partial

    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    import jax.numpy as jnp
    import optax
    import pytest

    from galore_jax import chain, galore, refresh, value_and_grad

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "first": jax.random.normal(keys[0], (16, 12)),
        "layers": jax.random.normal(keys[1], (3, 12, 12)),
        "last": jax.random.normal(keys[2], (12, 9)),
    }

    def loss(params, x):
        x = jnp.tanh(x @ params["first"])
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.mean((x @ params["last"]) ** 2) + 0.1 * jnp.sum(params["last"] ** 2)

    x = jax.random.normal(keys[3], (16, 16))
    tx = chain(galore(4), optax.adam(1e-3))
    state = tx.init(params)
    wanted = jax.jit(refresh(loss))(params, state, x)
    gradient = jax.jit(value_and_grad(loss))(params, wanted, x)[1]

    def close(found, wanted):
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert jnp.abs(one - other).max() <= 2e-5 * jnp.maximum(jnp.abs(other).max(), 1)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = (jax.P(), jax.P(), jax.P("data"))
    for checks in (True, False):
        for micro_batches in (1, 2):
            settings = {"micro_batches": micro_batches}

            def step(params, state, x, checks=checks, settings=settings):
                grads = value_and_grad(loss, **settings)(params, state, x)[1]
                # As jax.grad's, they are sums over the devices where shard_map checks this.
                if checks:
                    return jax.tree.map(lambda leaf: leaf / 4, grads)
                return jax.lax.pmean(grads, "data")

            sharded = jax.shard_map(
                step, mesh=mesh, in_specs=parts, out_specs=jax.P(), check_vma=checks
            )
            close(jax.jit(sharded)(params, wanted, x), gradient)

    def of_each_device(params, state, x):
        # Of parameters that differ from device to device gradients are each device's own.
        own = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        grads = value_and_grad(loss)(own, state, x)[1]
        return jax.lax.pmean(grads, "data")

    sharded = jax.shard_map(of_each_device, mesh=mesh, in_specs=parts, out_specs=jax.P())
    close(jax.jit(sharded)(params, wanted, x), gradient)

    repeat = partial(jax.tree.map, lambda leaf: jnp.stack([leaf] * 4))
    for mapped in (
        lambda f: jax.pmap(f, "data")(repeat(params), repeat(state), x.reshape(4, 4, 16)),
        lambda f: jax.shard_map(f, mesh=mesh, in_specs=parts, out_specs=jax.P())(params, state, x),
    ):
        with pytest.raises(ValueError, match="bases of its own: refresh outside"):
            mapped(lambda *arguments: refresh(loss)(*arguments))


@pytest.mark.slow
def test_inside_shard_map_gradients_are_projected_and_refreshes_refused():
    source = textwrap.dedent(inspect.getsource(on_four_devices)) + "\non_four_devices()\n"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]

"""The examples of docs/integrations.md: each framework trains with a low-rank state."""

import runpy
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_jax

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(example: str) -> dict[str, Any]:
    """The names after an example has run."""
    return runpy.run_path(str(EXAMPLES / f"{example}.py"))


def shapes(tree: Any) -> set[tuple[int, ...]]:
    return {leaf.shape for leaf in jax.tree.leaves(tree)}


def assert_close(found: Any, wanted: Any, start: Any, kernels: set[tuple[int, ...]]) -> None:
    """Equal up to rounding, after a step in which kernels moved much further."""
    for one, other, old in zip(*map(jax.tree.leaves, (found, wanted, start)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        assert one.shape not in kernels or np.abs(one - np.asarray(old)).max() > 1e-4


@pytest.mark.parametrize(
    ("module", "example", "kernels"),
    [
        ("equinox", "equinox_mlp", {(256, 64), (256, 256)}),
        ("haiku", "haiku_mlp", {(64, 256)}),
    ],
)
def test_models_with_a_tree_of_parameters(module, example, kernels):
    pytest.importorskip(module)
    names = run(example)
    tx, params, state, loss = (names[name] for name in ("tx", "params", "state", "loss"))
    (x, y), step = names["batches"][0], names["step"]
    assert kernels <= shapes(params)
    assert kernels.isdisjoint(shapes(state))
    assert names["value"] < 0.8 * jnp.mean(y**2) / 2
    assert not galore_jax.refresh_due(state)
    found, *_ = step(params, state, x, y)
    full = jax.jit(jax.grad(loss))(params, x, y)
    wanted, _ = galore_jax.apply_gradients(tx, full, state, params)
    assert_close(found, wanted, params, kernels)


def test_a_linen_train_state_and_its_checkpoint():
    names = run("flax_linen")
    state, (x, y) = names["state"], names["batches"][0]
    kernels = {(64, 256), (256, 32)}
    assert kernels <= shapes(state.params)
    assert kernels.isdisjoint(shapes(state.opt_state))
    assert names["loss"](state.params, x, y) < 0.8 * jnp.mean(y**2) / 2
    jax.tree.map(np.testing.assert_array_equal, names["restored"], state)

    grads = jax.grad(names["loss"])(state.params, x, y)
    found, _ = names["step"](state, x, y)
    wanted = state.apply_gradients(grads=grads)
    assert_close(found.params, wanted.params, state.params, kernels)


def test_an_nnx_model_and_optimizer(nnx):
    names = run("flax_nnx")
    model, optimizer, (x, y) = names["model"], names["optimizer"], names["batches"][0]
    kernels = {(64, 256), (256, 32)}
    assert kernels <= shapes(nnx.state(model, nnx.Param))
    assert kernels.isdisjoint(shapes(optimizer.opt_state))
    kept, dropped = nnx.clone(model), model.layers[2].rngs.count[...]
    assert int(dropped) == len(names["batches"])
    kept.eval()
    assert names["loss_fn"](kept, x, y) < 0.8 * jnp.mean(y**2) / 2

    wrapped = optimizer.opt_state
    assert names["refresh_due"](wrapped) == names["refresh_due"](nnx.as_pure(wrapped))

    other, other_optimizer = nnx.clone(model), nnx.clone(optimizer)
    start = nnx.clone(model)
    names["projected_step"](model, optimizer, x, y)
    names["step"](other, other_optimizer, x, y)
    params = [nnx.as_pure(nnx.state(each, nnx.Param)) for each in (model, other, start)]
    assert_close(*params, kernels)
    np.testing.assert_array_equal(model.layers[2].rngs.count[...], dropped + 1)
    names["value_and_grad"] = partial(galore_jax.value_and_grad, micro_batches=4)
    names["projected_step"].__wrapped__(model, optimizer, x, y)
    np.testing.assert_array_equal(model.layers[2].rngs.count[...], dropped + 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras causes them itself.
def test_an_optimizer_and_a_model_of_keras(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    names = run("keras_on_jax")
    model, history = names["model"], names["history"].history
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert history["accuracy"][-1] > history["accuracy"][0]
    kernels = {(32, 4, 8), (4, 8, 32), (32, 64), (64, 32)}
    assert kernels <= shapes([variable.value for variable in model.trainable_variables])
    slots = [np.asarray(variable.value) for variable in model.optimizer.variables]
    assert kernels.isdisjoint(shapes(slots))

    # The state comes back from a file, also for a model with full gradients.
    model.save(tmp_path / "model.keras")
    for kind in (names["GaLoreModel"], keras.Model):
        objects = {"GaLoreModel": kind}
        other = keras.saving.load_model(tmp_path / "model.keras", custom_objects=objects)
        assert type(other.optimizer) is names["GaLoreAdam"]
        assert other.optimizer.get_config() == model.optimizer.get_config()
        for one, wanted in zip(other.optimizer.variables, slots, strict=True):
            np.testing.assert_array_equal(one.value, wanted)
        start = [np.asarray(variable.value) for variable in other.trainable_variables]
        other.train_on_batch(names["x"][:16], names["y"][:16])
        if kind is names["GaLoreModel"]:
            model.train_on_batch(names["x"][:16], names["y"][:16])
        ends = [
            [variable.value for variable in each.trainable_variables] for each in (other, model)
        ]
        assert_close(*ends, start, kernels)


def test_accumulation_by_the_optimizer_holds_coordinates_and_takes_the_mean():
    names = run("accumulation")
    steps, params = names["steps"], {"kernel": jax.random.normal(jax.random.key(0), (32, 48))}
    state = names["tx"].init(params)
    assert state.inner_states[1].acc_grads["kernel"].value.shape == (16, 48)
    assert (32, 48) not in shapes(state)

    # With steepest descent an update is the mean of the gradients, projected.
    parts = galore_jax.galore(rank=16), optax.MultiSteps(optax.sgd(1.0), steps)
    tx = galore_jax.chain(parts[0], parts[1].gradient_transformation())
    new, state = params, tx.init(params)
    grads = jax.random.normal(jax.random.key(1), (steps, 32, 48))
    step = jax.jit(lambda p, s, g: galore_jax.apply_gradients(tx, {"kernel": g}, s, p))
    for count in range(steps):
        np.testing.assert_array_equal(new["kernel"], params["kernel"])
        new, state = step(new, state, grads[count])
    basis = state.inner_states[0].bases["kernel"].vectors["left"]
    wanted = params["kernel"] - 0.25 * basis @ (basis.T @ grads.mean(axis=0))
    np.testing.assert_allclose(new["kernel"], wanted, atol=1e-5)

    # A micro-batch that is not finite counts as zeros, the last one of an update too.
    for bad in range(1, steps):
        new, state = params, tx.init(params)
        for count in range(steps):
            gradient = jnp.full_like(grads[count], jnp.nan) if count == bad else grads[count]
            new, state = step(new, state, gradient)
        rest = grads.at[bad].set(0).mean(axis=0)
        wanted = params["kernel"] - 0.25 * basis @ (basis.T @ rest)
        np.testing.assert_allclose(new["kernel"], wanted, atol=1e-5)
        assert not jnp.any(state.inner_states[1].acc_grads["kernel"].value)

"""The opening examples of the README do what it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_jax import apply_gradients, chain, galore

README = Path(__file__).parents[1] / "README.md"


def loss(params, batch):
    return jnp.mean((batch @ params["kernel"] - 1) ** 2)


def test_the_short_form_and_the_stock_form_give_the_same_parameters_and_low_rank_moments():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    chained, stock, *_ = blocks
    # More rows than the rank: Adam follows rounding errors where there is no gradient.
    batch = jax.random.normal(jax.random.key(0), (320, 160))
    params = {"kernel": jax.random.normal(jax.random.key(1), (160, 192))}
    names = {"loss": loss, "params": params}
    exec(chained, names)
    short, state = names["step"](params, names["state"], batch)
    assert optax.tree.get(state, "mu")["kernel"].value.shape == (128, 192)
    names["grads"] = jax.grad(loss)(params, batch)
    exec(stock, names)
    assert optax.tree.get(names["state"], "mu")["kernel"].value.shape == (128, 192)
    np.testing.assert_allclose(names["params"]["kernel"], short["kernel"], atol=1e-6)


def test_the_training_loop_of_projected_gradients_refreshes_and_learns():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "renew = " in block)
    batch = jax.random.normal(jax.random.key(0), (32, 16))
    params = {"kernel": jax.random.normal(jax.random.key(1), (16, 24))}
    tx = chain(galore(rank=4, update_proj_gap=5), optax.adam(1e-1))
    names = {"jax": jax, "loss": loss, "apply_gradients": apply_gradients, "tx": tx}
    names |= {"params": params, "state": tx.init(params), "batches": 8 * [batch]}
    exec(example, names)
    assert loss(names["params"], batch) < 0.9 * loss(params, batch)
    assert int(names["state"].inner_states[0].bases["kernel"].age) == 3


def test_the_example_of_rules_runs_on_the_parameters_it_speaks_of():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    params = {
        "layers": {
            "attention": {"q_proj": {"kernel": jnp.ones((2, 96, 96))}},
            "mlp": {"up_proj": {"kernel": jnp.ones((2, 96, 128))}},
        },
        "embed_tokens": {"embedding": jnp.ones((200, 96))},
        "other": jnp.ones((40, 20)),
    }
    names = {"params": params}
    (example,) = (block for block in blocks if "rules=" in block)
    exec(example, names)
    bases = optax.tree.get(names["tx"].init(params), "bases")
    assert bases["layers"]["attention"]["q_proj"]["kernel"].projection.rank == 64
    assert bases["layers"]["mlp"]["up_proj"]["kernel"].vectors["right"].shape == (2, 128, 24)
    assert bases["embed_tokens"]["embedding"] == optax.MaskedNode()
    assert bases["other"].projection.rank == 5


def test_the_layer_by_layer_loop_refreshes_and_learns():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "LayeredModel" in block)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embedding": jax.random.normal(keys[0], (50, 1040)),
        "layers": {"kernel": jax.random.normal(keys[1], (2, 1040, 1040)) / 100},
    }
    names = {
        "jax": jax,
        "params": params,
        "batches": 3 * [jax.random.randint(keys[2], (4, 8), 0, 50)],
        "embed": lambda params, batch: (params["embedding"][batch], None),
        "block": lambda params, x, beside: x + jnp.tanh(x @ params["kernel"]),
        "head_loss": lambda params, x, batch: (jnp.mean(x**2), None),
    }
    exec(example, names)
    assert names["loss"] < 2
    basis = names["state"].inner.inner_states[0].bases["layers"]["kernel"]
    np.testing.assert_array_equal(basis.age, [3, 3])
    assert basis.vectors["left"].shape == (2, 1040, 1024)

"""The opening examples of the README do what it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

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

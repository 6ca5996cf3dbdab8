"""Gradients that the backward pass projects, against full ones that are projected afterwards."""

import functools
import itertools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from next_tokens import next_tokens
from pairwise import pairwise
from projected import MLP, compared, inputs, squared, started

import galore_jax
from galore_jax import (
    Rule,
    apply_gradients,
    check_projection,
    galore,
    refresh,
    refresh_due,
    value_and_grad,
)
from galore_jax.grads import projected_product
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.optim.galore_state import galore_states
from galore_jax.training.pretraining import batch_loss


def llama(**settings):
    """A LLaMA's configuration, parameters and a packed batch of 4 rows."""
    config = LlamaConfig(97, 32, 56, 3, 2, max_length=20, **settings)
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (4, 20), 0, 97)
    segments = jnp.where(jnp.arange(20) < 7, 1, 2) * jnp.ones_like(tokens)
    positions = jnp.where(jnp.arange(20) < 7, 0, -7) + jnp.arange(20) + jnp.zeros_like(tokens)
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    batch["targets"] = next_tokens(tokens, segments)
    return config, Llama(config).init(key, tokens)["params"], batch


LLAMA_KERNELS = {
    *(f"layers/attention/{name}_proj/kernel" for name in "qkvo"),
    *(f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")),
}


@pytest.mark.parametrize(
    ("proj_type", "dtype", "remat"),
    pairwise(("std", "reverse_std", "full"), ("float32", "bfloat16"), (False, True)),
)
def test_coordinates_of_the_whole_llama_equal_projected_gradients(dtype, remat, proj_type):
    config, params, batch = llama(dtype=dtype, remat=remat)
    loss = functools.partial(batch_loss, config)
    projected = compared(loss, params, batch, dtype=dtype, proj_type=proj_type, has_aux=True)
    assert projected == LLAMA_KERNELS


def test_check_projection_measures_how_well_coordinates_agree():
    config, params, batch = llama()
    loss = functools.partial(batch_loss, config)
    _, state = started(params)
    errors = check_projection(loss, has_aux=True)(params, state, batch)
    assert set(errors) == LLAMA_KERNELS
    assert max(errors.values()) <= 1e-5


def test_check_projection_allows_for_the_rounding_of_the_products():
    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(24, name="wide")(x)
            return nn.Dense(8, dtype=jnp.bfloat16, name="narrow")(nn.gelu(x))

    loss, params = squared(Narrow(), inputs(5, 16))
    _, state = started(params)
    errors = check_projection(loss)(params, state, inputs(5, 16))
    assert set(errors) == {"wide/kernel", "narrow/kernel"}
    assert 1e-4 < errors["narrow/kernel"] < 0.05

    @jax.custom_vjp
    def wrong(x):
        return x

    # A backward pass that differs from one call to the next, in a loss of float32 numbers alone.
    calls = itertools.count(1000)
    wrong.defvjp(lambda x: (x, None), lambda _, dy: (dy * next(calls),))
    loss = lambda params, x: jnp.mean(jnp.sin(wrong(x @ params["w"])) ** 2)
    params = {"w": inputs(16, 12)}
    _, state = started(params)
    with pytest.raises(ValueError, match="differ from those of its full gradient by"):
        check_projection(loss)(params, state, inputs(5, 16))


def test_steps_run_under_the_checks_and_guards_of_jax():
    params, x = {"stack": inputs(3, 16, 16)}, inputs(5, 16)
    tx, state = started(params)

    def loss(params, x):
        x = x @ params["stack"][0] @ params["stack"][jnp.array([2, 1])].sum(0)
        return jnp.mean(jnp.sin(x @ jax.lax.rev(params["stack"], (0,))[0]) ** 2)

    @jax.jit
    def step(params, state, x):
        state = refresh(loss)(params, state, x)
        value, grads = value_and_grad(loss)(params, state, x)
        return value, apply_gradients(tx, grads, state, params)

    with jax.enable_checks(True):
        step(params, state, x)
    jax.clear_caches()
    with jax.transfer_guard("disallow"):
        assert refresh_due(state)
        step(params, state, x)


def test_a_batch_is_split_and_keywords_are_not():
    loss, params = squared(MLP(), inputs(6, 16))
    _, state = started(params)
    scaled = lambda params, x, *, scale: scale * loss(params, x)
    one, _ = value_and_grad(loss)(params, state, inputs(6, 16))
    mean, _ = value_and_grad(scaled, micro_batches=3)(
        params, state, inputs(6, 16), scale=jnp.float32(2)
    )
    np.testing.assert_allclose(mean, 2 * one, rtol=1e-6)
    with pytest.raises(ValueError, match=r"shapes \[\(6, 16\)\] cannot be split into 4 micro-b"):
        value_and_grad(loss, micro_batches=4)(params, state, inputs(6, 16))
    with pytest.raises(
        ValueError, match=r"shapes \[\(6, 16\), \(16, 16\)\] cannot be split into 2"
    ):
        value_and_grad(loss, micro_batches=2)(params, state, inputs(6, 16), inputs(16, 16))
    with pytest.raises(ValueError, match="passed by keyword are not split"):
        value_and_grad(loss, micro_batches=2)(params, state, x=inputs(6, 16))


def test_a_key_for_each_row_gives_micro_batches_their_own_dropout():
    def loss(params, x, keys):
        mask = jax.random.bernoulli(keys[0], shape=(64,))
        return jnp.mean((x @ params["w"]) ** 2), mask.astype(jnp.float32)

    params, x, keys = {"w": inputs(16, 12)}, inputs(6, 16), jax.random.split(jax.random.key(0), 6)
    _, state = started(params)
    gradients = value_and_grad(loss, has_aux=True, micro_batches=2)
    (_, mask), _ = gradients(params, state, x, keys)
    drawn = [jax.random.bernoulli(keys[i], shape=(64,)) for i in (0, 1)]
    np.testing.assert_array_equal(mask, np.mean(drawn, axis=0))


def test_coordinates_in_float16_do_not_overflow():
    loss = lambda params, x: jnp.mean(x @ params["w"])
    params = {"w": inputs(16, 12)}
    tx, state = started(params)
    _, grads = value_and_grad(loss)(params, state, inputs(6, 16))
    large = jax.tree.map(lambda g: jnp.full_like(g, 300, jnp.float16), grads)
    new, state = galore_jax.apply_gradients(tx, large, state, params)
    assert galore_states(state, inside_chains=True)[0].bases["w"].skipped == 0
    assert jnp.any(new["w"] != params["w"])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_keys_and_counts_in_the_aux_stay_what_they_are(micro_batches):
    def loss(params, x):
        aux = {"key": jax.random.key(3), "count": jnp.uint32(7), "right": jnp.sum(x > 0)}
        return jnp.mean((x @ params["w"]) ** 2), aux

    params, x = {"w": inputs(16, 12)}, inputs(6, 16)
    _, state = started(params)
    gradients = value_and_grad(loss, has_aux=True, micro_batches=micro_batches)
    (_, aux), _ = jax.jit(gradients)(params, state, x)
    assert aux["key"] == jax.random.key(3)
    assert (aux["count"], aux["count"].dtype) == (7, jnp.uint32)
    np.testing.assert_allclose(aux["right"], jnp.sum(x > 0) / micro_batches)


@pytest.mark.parametrize("compute", [value_and_grad, galore_jax.refresh])
def test_states_that_do_not_fit_are_refused(compute):
    loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    params, x = {"w": inputs(16, 12)}, inputs(5, 16)
    _, state = started({"w": inputs(16, 20)})
    with pytest.raises(ValueError, match=r"w has the shape \(16, 12\), but .* with \(16, 20\)"):
        compute(loss)(params, state, x)
    adam = optax.adam(1e-3)
    with pytest.raises(ValueError, match="need the state of an optimizer with galore"):
        compute(loss)(params, adam.init(params), x)
    with pytest.raises(ValueError, match=r"started with tx.init\(params\)"):
        compute(loss)(params, optax.chain(galore(4), adam).init(params), x)
    for other in (params, adam.init(params)):
        with pytest.raises(ValueError, match="pass the optimizer's state"):
            refresh_due(other)


def test_a_loss_must_return_a_number():
    params = {"w": inputs(16, 12)}
    _, state = started(params)
    with pytest.raises(TypeError, match="must return a number, not None"):
        value_and_grad(lambda params: None)(params, state)


def test_an_update_with_coordinates_leaves_a_basis_that_is_due_as_it_is_and_due():
    loss, params = squared(MLP(), inputs(5, 16))
    tx, state = started(params, update_proj_gap=2)
    before = galore_states(state, inside_chains=True)[0].bases
    for _ in range(3):
        _, grads = value_and_grad(loss)(params, state, inputs(5, 16))
        params, state = apply_gradients(tx, grads, state, params)
    after = galore_states(state, inside_chains=True)[0]
    assert int(after.count) == 3
    assert bool(refresh_due(state))
    np.testing.assert_array_equal(
        after.bases["first"]["kernel"].vectors["left"], before["first"]["kernel"].vectors["left"]
    )


def dots(text):
    """Of every dot in an HLO text: the sizes of its result, and the product of those it sums over.

    Yields pairs of a sorted tuple of sizes without ones, and a number.
    """
    for computation in text.split("\n}"):
        shapes = {
            name: tuple(map(int, filter(None, sizes.split(","))))
            for name, sizes in re.findall(r"%(\S+) = \w+\[([\d,]*)\]", computation)
        }
        pattern = (
            r"%\S+ = \w+\[([\d,]*)\]\S* dot\(%?([\w.-]+), .*?lhs_contracting_dims=\{([\d,]*)\}"
        )
        for sizes, left, summed in re.findall(pattern, computation):
            result = tuple(sorted(int(n) for n in sizes.split(",") if n and n != "1"))
            yield result, math.prod(shapes[left][int(axis)] for axis in summed.split(","))


def weight_gradients(kernels, tokens, step, *arguments):
    """The number of products over so many tokens as large as one of the kernels."""
    text = jax.jit(step).lower(*arguments).compile().as_text()
    assert "dot(" in text
    return sum(result in kernels and summed == tokens for result, summed in dots(text))


def test_no_product_over_tokens_is_as_large_as_a_projected_kernel():
    config, params, batch = llama()
    loss = lambda params, batch: batch_loss(config, params, batch)[0]
    tx = galore_jax.adamw(1e-3, rank=7, rules={"lm_head/*": Rule(rank=7)})
    state = tx.init(params)

    def projected(params, state, batch):
        _, grads = value_and_grad(loss)(params, state, batch)
        return apply_gradients(tx, grads, state, params)

    def full(params, state, batch):
        return apply_gradients(tx, jax.grad(loss)(params, batch), state, params)

    count = functools.partial(weight_gradients, {(32, 32), (32, 56), (32, 97)}, 80)
    assert count(projected, params, state, batch) == 0
    assert count(refresh(loss), params, state, batch) == 0
    assert count(full, params, state, batch) >= 3


def test_a_training_step_holds_no_factorisation():
    config, params, batch = llama()
    loss = functools.partial(batch_loss, config)
    tx = galore_jax.adamw(1e-3, rank=8)
    state = tx.init(params)

    def projected(params, state, batch):
        _, grads = value_and_grad(loss, has_aux=True)(params, state, batch)
        return apply_gradients(tx, grads, state, params)

    def primitives(step):
        return str(jax.make_jaxpr(step)(params, state, batch))

    factorisations = re.compile(r"= (cholesky|svd|eigh|qr|geqrf|triangular_solve)\[")
    assert not factorisations.search(primitives(projected))
    assert factorisations.search(primitives(refresh(loss, has_aux=True)))


def test_axes_that_stay_in_place_as_on_tpus_give_the_same_coordinates(monkeypatch):
    config, params, batch = llama()
    loss = functools.partial(batch_loss, config)
    state = galore_jax.adamw(1e-3, rank=8).init(params)
    layouts = []

    def in_place(layout, dtype, x, dy, vectors):
        del dtype
        layouts.append(layout)
        return projected_product._in_bases(layout, x, dy, vectors)[0], dy

    _, expected = value_and_grad(loss, has_aux=True)(params, state, batch)
    monkeypatch.setattr(projected_product, "_coordinates", in_place)
    _, found = value_and_grad(loss, has_aux=True)(params, state, batch)
    assert any(len(layout.x_axes) > 2 for layout in layouts)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


@pytest.mark.parametrize("stacked", [False, True])
def test_weights_cast_before_blocks_are_cast_in_each_of_their_products_on_tpus(stacked):
    @jax.checkpoint
    def block(x, kernel):
        return jnp.sin(x @ kernel), None

    def loss(params, x):
        kernels = params["kernels"].astype(jnp.bfloat16)
        y = jax.lax.scan(block, x, kernels)[0] if stacked else block(x, kernels)[0]
        return jnp.sum(y.astype(jnp.float32) ** 2)

    params = {"kernels": jnp.ones((2, 16, 16) if stacked else (16, 16)) / 16}
    _, state = started(params)
    traced = jax.jit(value_and_grad(loss)).trace(params, state, jnp.ones((8, 16), jnp.bfloat16))

    def casts_of_a_matrix(platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("(tensor<16x16xf32>) -> tensor<16x16xbf16>")

    # Forwards, and backwards for both products.
    assert casts_of_a_matrix("tpu") - casts_of_a_matrix("cpu") >= 2


def test_each_counter_and_setting_of_a_donated_state_stays_in_its_buffer():
    # Otherwise XLA copies hundreds of numbers at each step.
    config, params, batch = llama()
    loss = functools.partial(batch_loss, config)
    tx = galore_jax.chain(galore(rank=8), optax.adam(1e-3))
    state = jax.tree.map(jnp.copy, tx.init(params))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        _, grads = value_and_grad(loss, has_aux=True)(params, state, batch)
        return apply_gradients(tx, grads, state, params)

    def buffers(state):
        bases = galore_states(state, inside_chains=True)[0].bases
        leaves = jax.tree_util.tree_leaves_with_path(bases)
        return {jax.tree_util.keystr(path): leaf.unsafe_buffer_pointer() for path, leaf in leaves}

    before = buffers(state)
    _, state = step(jax.tree.map(jnp.copy, params), state, batch)
    assert buffers(state) == before

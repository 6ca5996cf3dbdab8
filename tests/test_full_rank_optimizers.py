"""NorMuon, FOAM and SCALE, against NumPy written from the formulas of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from galore_jax.optim.foam import scale_by_foam
from galore_jax.optim.muon import scale_by_muon
from galore_jax.optim.normuon import scale_by_neuron_norms
from galore_jax.optim.scale_sgd import scale_by_column_norms

IN, OUT, STEPS = 24, 40, 4


def gradients(rows=IN):
    random = np.random.default_rng(0)
    # Columns of different sizes.
    return [
        random.normal(size=(rows, OUT)) * 10.0 ** random.integers(-3, 1, OUT) for _ in range(STEPS)
    ]


def updates(tx, gradients):
    state, found = tx.init({"kernel": jnp.zeros(gradients[0].shape)}), []
    for gradient in gradients:
        update, state = jax.jit(tx.update)({"kernel": jnp.float32(gradient)}, state)
        found.append(update["kernel"])
    return found


def test_normuon_is_the_formula_of_its_paper():
    tx = optax.chain(scale_by_muon(0.9), scale_by_neuron_norms(0.95))
    moment, squares = np.zeros((IN, OUT)), np.zeros(OUT)
    for update, gradient in zip(updates(tx, gradients()), gradients(), strict=True):
        moment = 0.9 * moment + 0.1 * gradient
        orthogonal = reference.newton_schulz(0.9 * moment + 0.1 * gradient)  # Nesterov's momentum
        squares = 0.95 * squares + 0.05 * np.mean(orthogonal**2, axis=0)
        equal = orthogonal / np.sqrt(squares)
        expected = 0.2 * np.sqrt(IN * OUT) / np.linalg.norm(equal) * equal
        np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-4)


def test_after_one_step_of_normuon_all_neurons_are_of_one_size():
    tx = optax.chain(scale_by_muon(), scale_by_neuron_norms())
    update = updates(tx, gradients()[:1])[0]
    np.testing.assert_allclose(np.sqrt(np.mean(update**2, axis=0)), 0.2, 1e-4)


@pytest.mark.parametrize("rows", [24, 21])
def test_foam_is_the_formula_of_its_paper(rows):
    blocks = [slice(start, min(start + 8, rows)) for start in range(0, rows, 8)]
    mean, square = np.zeros((rows, OUT)), np.zeros((rows, OUT))
    found = updates(scale_by_foam(3, 0.9, 0.99, 1e-8), gradients(rows))
    for step, (update, gradient) in enumerate(zip(found, gradients(rows), strict=True), 1):
        average = np.empty_like(gradient)
        for block in blocks:
            average[block] = gradient[block].mean(axis=0)
        rest = gradient - average
        mean = 0.9 * mean + 0.1 * average
        square = 0.99 * square + 0.01 * average**2
        first, second = mean / (1 - 0.9**step), square / (1 - 0.99**step)
        expected = (first + rest) / (np.sqrt(second + rest**2) + 1e-8)
        np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("level", "share"), [(1, 2), (3, 8)])
def test_foam_keeps_two_numbers_for_each_block(level, share):
    state = scale_by_foam(level).init({"kernel": jnp.zeros((2, IN, OUT))})
    assert state.mu["kernel"].shape == state.nu["kernel"].shape == (2, IN // share, OUT)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scale_is_the_formula_of_its_paper_with_the_columns_root_mean_square(momentum):
    tx, moment = scale_by_column_norms(momentum), np.zeros((IN, OUT))
    for update, gradient in zip(updates(tx, gradients()), gradients(), strict=True):
        moment = momentum * moment + (1 - momentum) * gradient
        expected = moment / np.linalg.norm(moment, axis=0) * np.sqrt(IN)
        np.testing.assert_allclose(update, expected, rtol=1e-4)


def test_scale_keeps_nothing_without_momentum():
    assert not jax.tree.leaves(scale_by_column_norms().init({"kernel": jnp.zeros((IN, OUT))}))


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(scale_by_muon(), scale_by_neuron_norms()),
        scale_by_foam(),
        scale_by_column_norms(),
    ],
    ids=["normuon", "foam", "scale"],
)
def test_a_gradient_of_zeros_gives_no_update_and_a_stack_that_of_each_matrix(tx):
    np.testing.assert_array_equal(updates(tx, [np.zeros((IN, OUT))])[0], 0)
    stack = np.stack(gradients()[:2])
    for of_stack, gradient in zip(updates(tx, [stack])[0], stack, strict=True):
        np.testing.assert_allclose(of_stack, updates(tx, [gradient])[0], rtol=1e-5, atol=1e-6)

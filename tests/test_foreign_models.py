"""Gradients of models that know nothing of GaLore: an encoder of Flax Linen's layers."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import reference_full
from optax.contrib import GaLoreDimensionNumbers
from projected import compared, inputs, squared
from reference import Moments

import galore_jax
from galore_jax.subspace.basis import is_basis


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attend = nn.MultiHeadDotProductAttention(num_heads=2, deterministic=True)
        x = x + attend(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.gelu(nn.Dense(40)(nn.LayerNorm()(x)))), None


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(name="layers")(x, None)[0]


class General(nn.Module):
    """Contracts two axes, apart for each element of a batch axis."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((3, 5), axis=(-2, -1), batch_dims=(0,), name="general")(x)


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_coordinates_in_a_foreign_model_equal_projected_gradients(proj_type):
    attention = {
        f"MultiHeadDotProductAttention_0/{name}" for name in ("query", "key", "value", "out")
    }
    loss, params = squared(Encoder(), inputs(2, 7, 16))
    projected = compared(loss, params, inputs(2, 7, 16), proj_type=proj_type)
    assert projected == {f"layers/{name}/kernel" for name in ("Dense_0", "Dense_1", *attention)}


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_dimension_numbers_say_how_a_kernel_of_many_axes_is_read(proj_type):
    x = inputs(3, 5, 4, 6)
    loss, params = squared(General(), x)
    assert params["general"]["kernel"].shape == (3, 4, 6, 3, 5)
    # In other orders than the layer's own.
    numbers = {"general": {"kernel": GaLoreDimensionNumbers((2, 1), (4, 3)), "bias": None}}
    settings = {"weight_dimension_numbers": numbers, "proj_type": proj_type}
    assert compared(loss, params, x, **settings) == {"general/kernel"}
    # Read in a way that the layer does not multiply by, its gradient is formed whole.
    numbers["general"]["kernel"] = GaLoreDimensionNumbers((1, 3), (2, 4))
    assert compared(loss, params, x, **settings) == set()


@pytest.mark.parametrize("optimizer", ["fira", "apollo"])
def test_steps_along_full_gradients_are_those_of_the_reference_for_every_kernel(optimizer):
    x = inputs(2, 7, 16)
    mean, params = squared(Encoder(), x)
    settings = {"learning_rate": 0.05, "scale": 0.5, "weight_decay": 0.1}
    tx = getattr(galore_jax, optimizer)(rank=4, update_proj_gap=2, refresh="svd", **settings)
    state = tx.init(params)
    # Gradients far above Adam's eps.
    gradient = jax.jit(jax.grad(lambda params: 1000 * mean(params, x)))
    step = jax.jit(lambda p, s, g: galore_jax.apply_gradients(tx, g, s, p))

    def leaves(params, state, grads):
        """The arrays of each projected kernel: its weights, gradient, moments and norm, bases."""
        tree = jax.tree.structure(params)
        (kept, *_) = state
        trees = params, grads, kept.mu, kept.nu, kept.norm, kept.bases
        for *arrays, basis in zip(*map(tree.flatten_up_to, trees), strict=True):
            if is_basis(basis):
                weights, grad, *kept = (getattr(array, "value", array) for array in arrays)
                matrices = map(basis.projection.view.to_matrices, (weights, grad))
                yield [*matrices, *kept, basis.vectors]

    for count in range(4):
        grads = gradient(params)
        after, new = step(params, state, grads)
        pairs = list(zip(leaves(params, state, grads), leaves(after, new, grads), strict=True))
        assert len(pairs) == 6
        for old, found in pairs:
            for layer in range(3):
                exact = lambda array, layer=layer: np.asarray(array[layer], np.float64)
                weights, grad, first, second, norm, _ = jax.tree.map(exact, old)
                moments = Moments({"first": first, "second": second, "norm": norm}, count)
                wanted, kept = reference_full.step(
                    *(optimizer, weights, grad, moments, jax.tree.map(exact, found[-1])),
                    method="svd",
                    **settings,
                )
                np.testing.assert_allclose(found[0][layer], wanted, atol=1e-5)
                # Of columns almost outside of the subspace the coordinates have fewer digits.
                np.testing.assert_allclose(found[4][layer], kept.values["norm"], rtol=1e-4)
        params, state = after, new

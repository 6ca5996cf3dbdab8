"""Adam with 8-bit moments: compared with Adam, combined with GaLore, and in chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import loss, random_params

import galore_jax
from galore_jax import apply_gradients, chain, galore, scale_by_adam8bit
from galore_jax.ops import implementation, pallas_tpu, pallas_triton
from galore_jax.ops.quantization import Quantized, dequantize, quantize
from galore_jax.subspace.projection import Coordinates, is_coordinates

SHAPES = {"stack": (3, 72, 300), "tall": (300, 72), "bias": (300,)}


def interpret(monkeypatch, module):
    """Makes `implementation="pallas"` mean the kernels of a module, interpreted on the CPU."""
    kernels = lambda name: {"cpu": functools.partial(getattr(module, name), interpret=True)}
    monkeypatch.setattr(implementation, "_kernels", kernels)


def adam8bit(learning_rate):
    return optax.chain(scale_by_adam8bit(), optax.scale_by_learning_rate(learning_rate))


compiled_quantize = jax.jit(quantize, static_argnums=1)


def is_stored(node):
    return isinstance(node, Quantized)


@jax.jit
def as_float(state):
    return jax.tree.map(dequantize, state, is_leaf=is_stored)


def test_one_step_equals_adam_from_the_stored_moments():
    params = random_params(SHAPES)
    grads = [random_params(SHAPES, seed) for seed in (1, 2, 3)]
    tx, plain = scale_by_adam8bit(0.9, 0.99, 1e-8), optax.scale_by_adam(0.9, 0.99, 1e-8)
    state, update, exact = tx.init(params), jax.jit(tx.update), jax.jit(plain.update)
    for grad in grads:
        wanted, after = exact(grad, optax.ScaleByAdamState(*as_float(state)))
        found, state = update(grad, state)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
        for name, code in (("mu", "signed"), ("nu", "unsigned")):
            stored = getattr(state, name)["stack"]["kernel"]
            rounded = compiled_quantize(getattr(after, name)["stack"]["kernel"], code)
            # A moment near the midpoint of two values may be rounded either way.
            steps = np.abs(stored.codes.astype(int) - rounded.codes.astype(int))
            assert steps.max() <= 1
            assert (steps > 0).mean() < 1e-3
            np.testing.assert_allclose(stored.scales, rounded.scales, rtol=1e-6)
    assert int(state.count) == 3


def test_small_leaves_keep_float32_moments_and_equal_adam():
    params = {"small": jnp.zeros(4095), "large": jnp.zeros(4096)}
    grads = {"small": jnp.linspace(-1, 1, 4095), "large": jnp.linspace(-1, 1, 4096)}
    tx, plain = scale_by_adam8bit(), optax.scale_by_adam()
    state, other = tx.init(params), plain.init(params)
    assert isinstance(state.mu["large"], Quantized)
    update, exact = jax.jit(tx.update), jax.jit(plain.update)
    for _ in range(3):
        found, state = update(grads, state)
        wanted, other = exact(grads, other)
        np.testing.assert_allclose(found["small"], wanted["small"], rtol=2**-20)
    np.testing.assert_allclose(state.nu["small"], other.nu["small"], rtol=2**-20)


def test_leaves_whose_scales_would_outweigh_the_codes_keep_float32_moments():
    state = scale_by_adam8bit().init({"narrow": jnp.zeros((999, 15)), "wide": jnp.zeros((999, 16))})
    assert state.mu["narrow"].dtype == jnp.float32
    assert isinstance(state.mu["wide"], Quantized)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_a_gradient_whose_square_is_infinite_leaves_the_moments_finite(implementation, monkeypatch):
    interpret(monkeypatch, pallas_tpu)
    params = {"kernel": jnp.zeros((16, 512))}
    tx = scale_by_adam8bit(implementation=implementation)
    state = tx.init(params)
    for size in (1.0, 1e30, 1.0, 1.0):
        grads = {"kernel": jnp.ones((16, 512)).at[3, 5].set(size)}
        updates, state = jax.jit(tx.update)(grads, state)
        # At most that of a gradient which is 0 in all but the last step: (1 - b1) / √(1 - b2).
        assert jnp.abs(updates["kernel"]).max() <= 0.1 / 0.001**0.5
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(as_float(state)))


def test_moments_take_two_bytes_a_number_and_a_sixty_fourth():
    state = scale_by_adam8bit().init({"kernel": jnp.zeros((64, 512))})
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 64 * 512 * 2 * (1 + 4 / 256) + 4


def eight_bit(moments, **settings):
    return galore_jax.adamw(
        0.02, 16, 5, eight_bit=True, moments=moments, weight_decay=0.1, **settings
    )


@pytest.mark.parametrize(
    ("moments", "basis_dtype"), [("keep", jnp.int8), ("rotate", jnp.float32)], ids=str
)
def test_galore_with_8_bit_moments_follows_that_with_float32_ones(moments, basis_dtype):
    target = random_params(SHAPES, 5)
    ends = []
    for bits in (True, False):
        settings = {"eight_bit": bits, "moments": moments, "basis_dtype": basis_dtype}
        tx = galore_jax.adamw(0.02, 16, 5, **settings)
        params = jax.tree.map(jnp.zeros_like, target)
        state = tx.init(params)

        @jax.jit
        def step(params, state, tx=tx):
            return apply_gradients(tx, jax.grad(loss)(params, target), state, params)

        start = loss(params, target)
        for _ in range(40):
            params, state = step(params, state)
        ends.append(float(loss(params, target) / start))
    assert ends[0] < 0.9
    np.testing.assert_allclose(*ends, rtol=0.05)


def test_a_chain_of_galore_and_adam8bit_keeps_codes_of_coordinates():
    params = random_params(SHAPES)
    state = chain(galore(rank=16), adam8bit(1e-3)).init(params)
    mu = optax.tree.get(state, "mu")["stack"]["kernel"]
    assert isinstance(mu, Coordinates)
    assert mu.value.codes.shape == mu.projection.coordinates_shape == (3, 16, 300)
    assert mu.value.scales.shape == (3, 16, 2)


def test_blocks_lie_down_the_columns_of_matrices_that_they_fill():
    shapes = {"kernel": (300, 512), "embedding": (512, 300)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    mu = optax.tree.get(jax.eval_shape(chain(galore(rank=256), adam8bit(1e-3)).init, params), "mu")
    assert mu["kernel"].value.scales.shape == (1, 512)
    # The rows of an embedding have gradients of different sizes.
    assert mu["embedding"].scales.shape == (512, 2)


@pytest.mark.parametrize(
    ("moments", "basis_dtype"), [("keep", jnp.float32), ("rotate", jnp.int8)], ids=str
)
def test_a_matrix_whose_gradient_is_not_finite_keeps_its_codes_weights_and_basis(
    moments, basis_dtype
):
    params = random_params(SHAPES)
    tx = eight_bit(moments, basis_dtype=basis_dtype)
    step = jax.jit(functools.partial(apply_gradients, tx))
    state = tx.init(params)
    for seed in range(2):
        params, state = step(random_params(SHAPES, seed + 1), state, params)
    bad = random_params(SHAPES, 9)
    bad["stack"]["kernel"] = bad["stack"]["kernel"].at[1, 3, 4].set(jnp.nan)
    new_params, new = step(bad, state, params)

    def matrix(tree, index):
        nodes = filter(is_coordinates, jax.tree.leaves(tree, is_leaf=is_coordinates))
        stacks = [node for node in nodes if node.projection.name == "stack/kernel"]
        return [np.asarray(leaf[index]) for node in stacks for leaf in jax.tree.leaves(node)]

    assert matrix(state, 1)
    for old, kept in zip(matrix(state, 1), matrix(new, 1), strict=True):
        np.testing.assert_array_equal(old, kept)
    kernels = params["stack"]["kernel"], new_params["stack"]["kernel"]
    np.testing.assert_array_equal(kernels[0][1], kernels[1][1])
    assert (kernels[0][0] != kernels[1][0]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new_params))


def test_int8_bases_are_nearly_orthonormal_and_capture_what_float32_ones_do():
    params, grads = random_params(SHAPES), random_params(SHAPES, 1)
    gradient, energies = grads["tall"]["kernel"], []
    for dtype in (jnp.float32, jnp.int8):
        tx = chain(galore(16, basis_dtype=dtype), optax.adam(1e-3))
        _, state = jax.jit(tx.update)(grads, tx.init(params), params)
        basis = state.inner_states[0].bases["tall"]["kernel"]
        vectors = dequantize(basis.vectors["right"])
        energies.append(float(jnp.sum((gradient @ vectors) ** 2)))
    assert basis.vectors["right"].codes.dtype == jnp.int8
    # A row of 16 numbers is a block. Its largest magnitude is below 0.5, so each number has a
    # random error of about 0.001, and a column of 72 numbers one of at most 0.01.
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(16), atol=0.02)
    np.testing.assert_allclose(*energies, rtol=0.01)


def test_it_works_under_tree_map_params_and_does_not_compile_again():
    params = random_params(SHAPES)
    tx = adam8bit(1e-3)
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf * 2, state)
    assert int(doubled[0].count) == int(state[0].count)
    step = jax.jit(tx.update)
    grads = random_params(SHAPES, 1)
    _, state = step(grads, state)
    step(grads, state)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("module", "moments", "dtype"),
    [(pallas_triton, "keep", jnp.bfloat16), (pallas_tpu, "rotate", jnp.float32)],
    ids=["triton-keep-bfloat16", "tpu-rotate-float32"],
)
def test_steps_with_kernels_equal_those_without(monkeypatch, module, moments, dtype):
    interpret(monkeypatch, module)
    params, key = random_params(SHAPES, dtype=dtype), jax.random.key(0)
    ends = []
    for name in ("xla", "pallas"):
        tx = eight_bit(moments, basis_dtype=jnp.int8, implementation=name)
        apply = jax.jit(functools.partial(apply_gradients, tx, key=key))
        new, state = params, tx.init(params)
        for seed in range(2):
            new, state = apply(random_params(SHAPES, seed), state, new)
        ends.append(new)
    for one, other, old in zip(*map(jax.tree.leaves, (*ends, params)), strict=True):
        assert one.dtype == dtype
        change = np.abs(one.astype(np.float32) - old.astype(np.float32)).max()
        difference = np.abs(one.astype(np.float32) - other.astype(np.float32))
        # Ties are rare, but move a number by 1/127 of the block's largest magnitude.
        assert change > 0.001
        assert difference.max() <= 0.05 * change + (2**-7 * 4 if dtype == jnp.bfloat16 else 0)
        assert (difference > 1e-5).mean() <= 0.01


@pytest.mark.parametrize("make", [galore_jax.adamw, galore_jax.muon])
@pytest.mark.parametrize("started", [False, True])
def test_a_state_with_other_moments_is_refused_in_a_sentence(make, started):
    params = random_params(SHAPES)
    state = make(0.1, rank=4, eight_bit=started).init(params)
    tx = make(0.1, rank=4, eight_bit=not started)
    with pytest.raises(
        ValueError, match=rf"use the optimizer .* \(eight_bit={started}\), or start"
    ):
        apply_gradients(tx, params, state, params)

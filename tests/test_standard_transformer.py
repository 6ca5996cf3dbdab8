"""A standard transformer in each framework: the gradients of all its kernels are projected.

Nothing is compiled. If a version of JAX renames a parameter of a primitive, its gradients are full,
exact and slow, and only a test such as this one says so.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_jax

WIDTH, HEADS, LAYERS = 32, 4, 3
X = jax.ShapeDtypeStruct((2, 8, WIDTH), jnp.float32)
# Of one layer: query, key, value and output of the attention, and two of the MLP.
KERNELS = 6


def mean_square(y):
    return jnp.mean(jnp.sin(y) ** 2)


def linen(stacked, remat):
    nn = pytest.importorskip("flax.linen")

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            attention = nn.MultiHeadDotProductAttention(num_heads=HEADS, deterministic=True)
            x = x + attention(nn.LayerNorm()(x))
            h = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
            return x + nn.Dense(WIDTH)(h), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.remat(Layer) if remat else Layer
            if stacked:
                axes, rngs = {"params": 0}, {"params": True}
                scan = nn.scan(layer, variable_axes=axes, split_rngs=rngs, length=LAYERS)
                return scan()(x, None)[0]
            for _ in range(LAYERS):
                x, _ = layer()(x)
            return x

    params = jax.eval_shape(lambda key: Model().init(key, jnp.zeros(X.shape)), jax.random.key(0))
    return lambda params, x: mean_square(Model().apply(params, x)), params


def nnx(stacked, remat):
    nnx = pytest.importorskip("flax.nnx")

    class Layer(nnx.Module):
        def __init__(self, rngs):
            settings = {"num_heads": HEADS, "in_features": WIDTH, "decode": False}
            self.attention = nnx.MultiHeadAttention(**settings, rngs=rngs)
            self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
            self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
            self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norms[0](x))
            return x + self.down(nnx.gelu(self.up(self.norms[1](x))))

    def run(layer, x):
        return layer(x)

    if remat:
        run = nnx.remat(run)
    if stacked:
        make = nnx.vmap(Layer, in_axes=0)
        model = make(nnx.Rngs(0).split(LAYERS))
        forward = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    else:
        model = nnx.List([Layer(nnx.Rngs(i)) for i in range(LAYERS)])

        def forward(layers, x):
            for layer in layers:
                x = run(layer, x)
            return x

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, x: mean_square(forward(nnx.merge(graph, params, rest), x)), params


def equinox(stacked, remat):
    eqx = pytest.importorskip("equinox")

    class Layer(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        norms: list
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
            self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]
            self.up = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=keys[1])
            self.down = eqx.nn.Linear(2 * WIDTH, WIDTH, key=keys[2])

        def __call__(self, x):
            h = jax.vmap(self.norms[0])(x)
            x = x + self.attention(h, h, h)
            h = jax.vmap(self.norms[1])(x)
            return x + jax.vmap(lambda h: self.down(jax.nn.gelu(self.up(h))))(h)

    keys = jax.random.split(jax.random.key(0), LAYERS)
    model = eqx.filter_vmap(Layer)(keys) if stacked else [Layer(key) for key in keys]
    params, static = eqx.partition(model, eqx.is_inexact_array)
    run = eqx.filter_checkpoint(lambda layer, x: layer(x)) if remat else lambda layer, x: layer(x)

    def of_row(params, x):
        if stacked:
            body = lambda x, layer: (run(eqx.combine(layer, static), x), None)
            return jax.lax.scan(body, x, params)[0]
        for layer in eqx.combine(params, static):
            x = run(layer, x)
        return x

    return lambda params, x: mean_square(jax.vmap(of_row, (None, 0))(params, x)), params


def haiku(stacked, remat):
    hk = pytest.importorskip("haiku")

    def layer(x):
        norm = lambda x: hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        scale = hk.initializers.VarianceScaling()
        h = norm(x)
        attention = hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=scale)
        x = x + attention(h, h, h)
        return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(2 * WIDTH)(norm(x))))

    def forward(x):
        run = hk.remat(layer) if remat else layer
        if stacked:
            return hk.experimental.layer_stack(LAYERS)(run)(x)
        for _ in range(LAYERS):
            x = run(x)
        return x

    model = hk.without_apply_rng(hk.transform(forward))
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    return lambda params, x: mean_square(model.apply(params, x)), params


@pytest.mark.parametrize("remat", [False, True], ids=["keep", "remat"])
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "scan"])
@pytest.mark.parametrize("framework", [linen, nnx, equinox, haiku])
def test_the_gradients_of_all_kernels_are_projected(framework, stacked, remat):
    loss, params = framework(stacked, remat)
    tx = galore_jax.chain(galore_jax.galore(4), optax.adam(1e-3))
    uses = galore_jax.describe(params, tx, loss, X).uses
    assert len(uses) == KERNELS * (1 if stacked else LAYERS)
    assert {name: own.reasons for name, own in uses.items() if own.gradient != "projected"} == {}

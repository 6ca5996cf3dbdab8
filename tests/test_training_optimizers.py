"""The optimizers of the trainer: the rate of the matrices, and Muon."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from next_tokens import next_tokens
from test_step import CONFIG, initial
from test_stepper import assert_equal

import galore_jax
from galore_jax.errors import InputError
from galore_jax.optim.galore_state import bases_of, galore_states
from galore_jax.subspace.matrix_view import named_leaves
from galore_jax.training.config import OptimizerConfig
from galore_jax.training.config_file import changed
from galore_jax.training.optimizer import make_optimizer, matrices
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import init_state, matrix_state_bytes, tree_bytes, tree_size
from galore_jax.training.step import make_train_step

RATE, FACTOR, DECAY = 0.01, 0.25, 0.5
SETTINGS = {"warmup_steps": 0, "learning_rate": RATE, "eps": 1e-8}
KERNELS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SHAPES = {"q_proj", "gate_proj", "down_proj"}
SIZES = {"q_proj": 16, "k_proj": 4}
OPTIMIZERS = [
    {"name": "adamw"},
    {"name": "muon"},
    {"name": "muon8bit"},
    {"name": "normuon"},
    {"name": "foam"},
    {"name": "scale"},
    {"name": "galore_adamw", "galore": {"rank": 8, "moments": "rotate"}},
    {"name": "galore_adafactor"},
    {"name": "galore_muon8bit", "galore": {"rank": 8, "attention_rank": 0.25}},
    {"name": "apollo", "galore": {"rank": 1}},
]


@pytest.fixture(scope="module")
def params():
    """Those of the model, with a square, a wide and a tall kernel of each layer."""

    def without(tree):
        rest = {name: node for name, node in tree.items() if name not in KERNELS - SHAPES}
        return {
            name: without(node) if isinstance(node, dict) else node for name, node in rest.items()
        }

    return without(initial(CONFIG).params)


@pytest.fixture(scope="module")
def gradients(params):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), params)


def updates(params, gradients, **settings):
    """The first update of each leaf, by its names."""
    optimizer = OptimizerConfig(
        **{"galore": {"rank": 8}, "gradients": "full", **SETTINGS, **settings}
    )
    tx = make_optimizer(optimizer, steps=10)

    @jax.jit
    def step(params):
        return galore_jax.apply_gradients(tx, gradients, galore_jax.init(tx, params), params)[0]

    difference = jax.tree.map(lambda new, old: np.asarray(new - old), step(params), params)
    return dict(named_leaves(difference))


def is_kernel(names):
    return names[-2] in KERNELS


def test_the_matrices_are_the_leaves_that_galore_projects():
    params = jax.eval_shape(lambda: init_state(Pretraining(CONFIG))).params
    found = {names for names, is_matrix in named_leaves(matrices(params)) if is_matrix}
    state = init_state(Pretraining(CONFIG)).opt_state
    assert found == {basis.projection.path for basis in bases_of(galore_states(state.inner_states))}
    assert {names[-2] for names in found} == KERNELS


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_the_matrix_rate_is_a_factor_for_the_matrices_alone_and_not_for_their_decay(
    params, gradients, optimizer
):
    plain = updates(params, gradients, **optimizer)
    slow = updates(params, gradients, **optimizer, matrix_rate=FACTOR, weight_decay=DECAY)
    for names, param in named_leaves(params):
        factor = FACTOR if is_kernel(names) else 1
        if OptimizerConfig(**optimizer).has_galore:
            factor *= 1 - RATE * DECAY  # Weights decay after the update.
        expected = factor * plain[names] - RATE * DECAY * param
        # The parameters, up to 1 in size, round both differences.
        np.testing.assert_allclose(slow[names], expected, atol=3e-7)
        assert np.abs(plain[names]).max() > 1e-4


def test_the_matrix_rate_counts_for_matrices_that_are_not_larger_than_the_rank():
    # Grouped heads have kernels of few columns, which GaLore does not project.
    params = {"layers": {name: {"kernel": jnp.ones((2, 16, n))} for name, n in SIZES.items()}}
    gradients = jax.tree.map(jnp.ones_like, params)
    plain = updates(params, gradients, name="galore_adamw")
    slow = updates(params, gradients, name="galore_adamw", matrix_rate=FACTOR)
    for names, update in slow.items():
        np.testing.assert_allclose(update, FACTOR * plain[names], atol=3e-7)
        assert np.abs(plain[names]).max() > 1e-4


def test_muon_orthogonalises_each_kernel_and_leaves_the_rest_to_adam(params, gradients):
    muon = updates(params, gradients, name="muon")
    adam = updates(params, gradients, name="adamw")
    for names, gradient in named_leaves(gradients):
        if not is_kernel(names):
            np.testing.assert_array_equal(muon[names], adam[names])
            continue
        for update, matrix in zip(muon[names], np.asarray(gradient, np.float64), strict=True):
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            values /= np.linalg.norm(values)
            for _ in range(5):  # Newton–Schulz with Muon's coefficients
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            expected = -RATE * 0.2 * max(matrix.shape) ** 0.5 * (left * values) @ right
            np.testing.assert_allclose(update, expected, atol=1e-6)


def test_muon_keeps_one_moment_of_the_matrices():
    adamw, muon = (changed(CONFIG, optimizer={"name": name}) for name in ("adamw", "muon"))
    shapes = jax.eval_shape(lambda: init_state(Pretraining(adamw))).params
    kernels = sum(leaf.size for names, leaf in named_leaves(shapes) if is_kernel(names))
    assert matrix_state_bytes(Pretraining(adamw)) == 8 * kernels
    assert matrix_state_bytes(Pretraining(muon)) == 4 * kernels
    rest = tree_bytes(jax.eval_shape(lambda: init_state(Pretraining(muon))).opt_state) - 4 * kernels
    counts = 2 * 4  # Of Adam and the schedule.
    assert rest == 8 * (tree_size(shapes) - kernels) + counts


def test_scale_keeps_a_moment_of_the_head_and_two_of_vectors():
    shapes = jax.eval_shape(lambda: init_state(Pretraining(CONFIG))).params
    state = jax.eval_shape(make_optimizer(OptimizerConfig(name="scale"), 10).init, shapes)
    head = 4 * shapes["lm_head"]["kernel"].size
    vectors = 8 * sum(leaf.size for names, leaf in named_leaves(shapes) if names[-1] == "scale")
    assert tree_bytes(state) == head + vectors + 3 * 4  # Counts of each and of the schedule.


def test_the_kernels_of_attention_may_have_a_rank_of_their_own(params):
    galore = {"rank": 4, "attention_rank": 0.5}
    tx = make_optimizer(OptimizerConfig("galore_muon", **SETTINGS, galore=galore), 10)
    ranks = {}
    for basis in bases_of(galore_states(tx.init(params), inside_chains=True)):
        *_, name, _ = basis.projection.path
        ranks[name] = basis.projection.rank
    assert ranks == {"q_proj": CONFIG.model.hidden_size // 2, "gate_proj": 4, "down_proj": 4}


def test_bases_count_as_state_of_the_matrices():
    # Of 2 layers: two moments of 4 attention and 3 MLP kernels at rank 8, and as many bases.
    moments = 2 * 8 * (4 * 32 + 3 * 48)
    bases = 8 * (4 * 32 + 3 * 32)
    counters, flags = 7 * (2 * 7 + 2), 7 * 2 * 2
    assert (
        matrix_state_bytes(Pretraining(CONFIG)) == 2 * 4 * (moments + bases) + 4 * counters + flags
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "normuon", "foam", "scale", "galore_fira"])
def test_layerwise_steps_equal_ordinary_ones(name):
    tokens = np.random.default_rng(0).integers(1, 97, (8, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.arange(16, dtype=np.int32) * ones
    batch = {"tokens": tokens, "segments": ones, "positions": positions}
    batch["targets"] = next_tokens(tokens, ones)
    optimizer = {"matrix_rate": 0.5, "weight_decay": 0.1, "warmup_steps": 0, "clip_norm": 0.5}
    # At this rate rounding does not grow in a few steps.
    optimizer |= {"name": name, "learning_rate": 1e-4}
    config = changed(CONFIG, optimizer=optimizer)
    other = changed(config, training={"layerwise": True})
    step, layerwise_step = make_train_step(Pretraining(config)), make_train_step(Pretraining(other))
    state, actual = initial(config), initial(other)
    for _ in range(3):
        state, _ = step(state, batch)
        actual, _ = layerwise_step(actual, batch)
    assert_equal(actual.params, state.params, atol=1e-5)


@pytest.mark.parametrize("name", ["galore_fira", "apollo"])
def test_fira_and_apollo_have_full_gradients_and_clip_them(name):
    config = OptimizerConfig(name=name, clip_norm=1.0)
    assert not config.has_projected_gradients
    changed(CONFIG, optimizer={"name": name, "clip_norm": 1.0}, training={"layerwise": True})


@pytest.mark.parametrize("name", ["galore_fira", "apollo"])
@pytest.mark.parametrize(
    "settings",
    [
        {"proj_type": "full"},
        {"moments": "rotate"},
    ],
)
def test_settings_that_fira_and_apollo_cannot_have_are_refused(name, settings):
    with pytest.raises(InputError, match=f'^optimizer.name = "{name}" scales .* keeps its moments'):
        OptimizerConfig(name=name, galore=settings)

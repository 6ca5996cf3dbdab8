"""Layer-wise steps against ordinary ones from equal states, and what they keep in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from next_tokens import next_tokens
from trees import max_difference

import galore_jax
from galore_jax import layerwise
from galore_jax.grads.layerwise import LayeredModel, LayerwiseState
from galore_jax.models import llama_layerwise
from galore_jax.models.llama import Llama, LlamaConfig
from galore_jax.models.loss import next_token_loss

CONFIG = LlamaConfig(97, 32, 56, 3, 4, num_kv_heads=2, max_length=24)
GAP = 5
# Everything that other models have and LLaMA has not.
OTHER_MODEL = dataclasses.replace(
    CONFIG,
    head_dim=10,
    attention_bias="qkvo",
    qk_norm=True,
    sliding_window=5,
    tie_embeddings=True,
    rope_factor=4.0,
    rope_original_length=8,
)


def model_of(config):
    functions = (llama_layerwise.embed, llama_layerwise.block, llama_layerwise.head_loss)
    return LayeredModel(*(functools.partial(f, config) for f in functions))


def initial(config):
    return Llama(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@functools.cache
def params_of(config):
    return jax.jit(initial, static_argnums=0)(config)


def batch_of(seed, rows=4, length=24):
    """Rows of two documents, the last of them padded."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 97, (rows, length))
    first = length * 2 // 3
    segments = np.where(np.arange(length) < first, 1, 2) * np.ones((rows, 1), int)
    segments[-1, -5:] = 0
    positions = np.where(np.arange(length) < first, np.arange(length), np.arange(length) - first)
    arrays = {
        "tokens": tokens,
        "segments": segments,
        "positions": positions * np.ones_like(tokens),
        "targets": next_tokens(tokens, segments),
    }
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def loss_of(config, params, batch):
    logits = Llama(config).apply(
        {"params": params}, batch["tokens"], batch["segments"], batch["positions"]
    )
    total, targets = next_token_loss(logits, batch["targets"])
    return total / targets


def compiled_steps(loss, tx, **settings):
    """Compiled steps of a loss or a layered model, by whether they refresh."""
    return {
        refreshes: jax.jit(galore_jax.make_step(loss, tx, refreshes=refreshes, **settings))
        for refreshes in (False, True)
    }


def both_steps(tx, config=CONFIG, **settings):
    """Layer-wise steps and ordinary ones."""
    loss = functools.partial(loss_of, config)
    return compiled_steps(model_of(config), tx, **settings), compiled_steps(loss, tx, **settings)


def layerwise_state(state):
    return LayerwiseState(state, jnp.float32(0))


CASES = {
    "adamw rotate": (galore_jax.adamw, {"moments": "rotate"}, True),
    "fira full": (galore_jax.fira, {"weight_decay": 0.1}, False),
    # The others are slow.
    "adamw keep": (galore_jax.adamw, {"moments": "keep", "weight_decay": 0.1}, True),
    "adamw two-sided": (galore_jax.adamw, {"proj_type": "full"}, True),
    "adafactor": (galore_jax.adafactor, {}, True),
    "muon rotate": (galore_jax.muon, {"moments": "rotate", "weight_decay": 0.1}, True),
    "adafactor full": (galore_jax.adafactor, {}, False),
    "lion rotate full": (galore_jax.lion, {"moments": "rotate"}, False),
    "apollo full": (galore_jax.apollo, {}, False),
}


@pytest.mark.parametrize(
    ("make", "settings", "projected"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if number > 1 else ())
        for number, (name, case) in enumerate(CASES.items())
    ],
)
def test_at_12_states_of_a_run_a_layerwise_step_equals_an_ordinary_one(make, settings, projected):
    schedule = optax.linear_schedule(0.003, 0.001, 12)
    tx = make(schedule, 8, GAP, **settings)
    steps, ordinary = both_steps(tx, projected=projected)
    if not projected:
        del steps[True]  # Full gradients are refreshed from in every step: it is the same program.
    params = params_of(CONFIG)
    state, refreshes = galore_jax.init(tx, params), 0
    for t in range(12):
        batch, before = batch_of(t), layerwise_state(state)
        after = {due: step(params, before, batch) for due, step in steps.items()}
        due = projected and bool(galore_jax.refresh_due(state))
        params, state, loss = ordinary[due](params, state, batch)
        found = after[due]
        refreshes += due
        assert max_difference(found.params, params) <= 1e-5, t
        for one, other in zip(
            jax.tree.leaves(found.state.inner), jax.tree.leaves(state), strict=True
        ):
            # Relative for the norms that Fira and APOLLO keep, which are about 20.
            np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(found.value, loss, rtol=1e-5)
        # Where nothing is due, the step that refreshes is the one that does not.
        if projected and not due:
            assert max_difference(after[True].params, after[False].params) <= 1e-6
    assert refreshes >= 3 or not projected


@pytest.mark.slow
def test_a_tied_model_with_biases_norms_and_a_window_takes_the_ordinary_step():
    tx = galore_jax.adamw(0.003, 8, GAP, weight_decay=0.1)
    steps, ordinary = both_steps(tx, OTHER_MODEL)
    params = params_of(OTHER_MODEL)
    state = galore_jax.init(tx, params)
    for t in range(GAP + 2):
        due = bool(galore_jax.refresh_due(state))
        found = steps[due](params, layerwise_state(state), batch_of(t))
        params, state, loss = ordinary[due](params, state, batch_of(t))
        assert max_difference(found.params, params) <= 1e-5, t
        np.testing.assert_allclose(found.value, loss, rtol=1e-5)
    loss = functools.partial(loss_of, OTHER_MODEL)
    report = galore_jax.describe(params, tx, loss, batch_of(0)).uses
    kernels = {f"layers/attention/{letter}_proj/kernel" for letter in "qkvo"}
    kernels |= {f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    assert report.keys() == kernels
    assert {uses.gradient for uses in report.values()} == {"projected"}


@pytest.mark.slow
def test_8_bit_moments_and_int8_bases_differ_by_codes_at_ties_alone():
    tx = galore_jax.adamw(0.003, 8, GAP, eight_bit=True, basis_dtype=jnp.int8)
    config = LlamaConfig(97, 64, 96, 3, 4, max_length=24)
    steps, ordinary = both_steps(tx, config)
    params = params_of(config)
    state = galore_jax.init(tx, params)
    for t in range(8):
        due = bool(galore_jax.refresh_due(state))
        found = steps[due](params, layerwise_state(state), batch_of(t))
        params, state, _ = ordinary[due](params, state, batch_of(t))
        pairs = zip(jax.tree.leaves(found.state.inner), jax.tree.leaves(state), strict=True)
        for one, other in pairs:
            if one.dtype in (jnp.uint8, jnp.int8):
                apart = np.abs(one.astype(int) - other.astype(int))
                assert apart.max() <= 1
                assert (apart > 0).mean() < 0.01
        # One step of a basis' code is 1/127 of its largest number: updates are off by so much.
        assert max_difference(found.params, params) <= 0.003 * 0.05


def part_of(batch, number, index):
    return jax.tree.map(lambda rows: rows[index::number], batch)


def ordinary_accumulation(tx, micro_batches, clip_norm):
    """A step over micro-batches, of which the first one refreshes the bases."""
    loss = functools.partial(loss_of, CONFIG)
    refresh = jax.jit(galore_jax.refresh(loss))
    settings = {"refreshes": False, "clip_norm": clip_norm, "micro_batches": micro_batches}
    step = jax.jit(galore_jax.make_step(loss, tx, **settings))

    def refreshed_step(params, state, batch):
        if galore_jax.refresh_due(state):
            state = refresh(params, state, part_of(batch, micro_batches, 0))
        return step(params, state, batch)

    return refreshed_step


@pytest.mark.parametrize("micro_batches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_are_accumulated_and_clipped_as_by_an_ordinary_step(micro_batches):
    tx = galore_jax.adamw(0.003, 8, GAP, weight_decay=0.1)
    settings = {"micro_batches": micro_batches, "clip_norm": 0.3}
    steps = compiled_steps(model_of(CONFIG), tx, **settings)
    ordinary = ordinary_accumulation(tx, **settings)
    params = params_of(CONFIG)
    state = galore_jax.init(tx, params)
    for t in range(GAP + 3):
        due = bool(galore_jax.refresh_due(state))
        found = steps[due](params, layerwise_state(state), batch_of(t))
        params, state, loss = ordinary(params, state, batch_of(t))
        assert found.state.norm > 0.3  # It is clipped.
        assert max_difference(found.params, params) <= 1e-5, t
        np.testing.assert_allclose(found.value, loss, rtol=1e-5)


def test_sums_in_bfloat16_are_off_by_their_rounding():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    tx = galore_jax.adamw(0.003, 8)
    params = params_of(config)
    state = layerwise.init(tx, params)
    step = galore_jax.make_step(model_of(config), tx, micro_batches=4, refreshes=False)
    found = jax.jit(step)(params, state, batch_of(0))
    gradients = galore_jax.value_and_grad(functools.partial(loss_of, config), micro_batches=4)
    loss, grads = jax.jit(gradients)(params, state.inner, batch_of(0))
    np.testing.assert_allclose(found.value, loss, rtol=2**-9)
    norm = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads))
    np.testing.assert_allclose(found.state.norm, norm, rtol=4 * 2**-9)
    moments = optax.tree.get(found.state.inner, "mu")["lm_head"]["kernel"]
    wanted = 0.1 * grads["lm_head"]["kernel"]
    # Four sums, each rounded to 8 bits, and gradients that are.
    np.testing.assert_allclose(moments, wanted, rtol=8 * 2**-8, atol=2**-8 * jnp.abs(wanted).max())


@pytest.mark.parametrize(
    "projected",
    [pytest.param(True, id="coordinates", marks=pytest.mark.slow), False],
)
def test_the_norm_of_the_step_itself_clips_as_an_ordinary_clip_does(projected):
    tx = galore_jax.adamw(0.003, 8, GAP)
    settings = {"projected": projected, "clip_norm": 0.3, "clip_by": "this_step"}
    steps, ordinary = both_steps(tx, **settings)
    params = params_of(CONFIG)
    state = galore_jax.init(tx, params)
    for t in range(7):
        due = projected and bool(galore_jax.refresh_due(state))
        found = steps[due](params, layerwise_state(state), batch_of(t))
        params, state, _ = ordinary[due](params, state, batch_of(t))
        assert found.state.norm > 0.3  # It is clipped.
        assert max_difference(found.params, params) <= 1e-5


@pytest.mark.slow
def test_the_previous_step_clips_by_its_own_norm_and_the_first_step_not_at_all():
    tx = galore_jax.chain(galore_jax.galore(8), optax.sgd(1.0))
    settings = {"clip_norm": 0.3, "clip_by": "previous_step"}
    clipped, free = (
        compiled_steps(model_of(CONFIG), tx, **extra)[True] for extra in (settings, {})
    )
    params = params_of(CONFIG)
    state = layerwise.init(tx, params)
    first, same = clipped(params, state, batch_of(0)), free(params, state, batch_of(0))
    assert max_difference(first.params, same.params) == 0
    second, whole = (step(params, first.state, batch_of(0)) for step in (clipped, free))
    # The same norm again is before any clipping.
    np.testing.assert_allclose(second.state.norm, first.state.norm, rtol=1e-6)
    np.testing.assert_allclose(second.state.norm, whole.state.norm, rtol=1e-6)
    factor = 0.3 / float(first.state.norm)
    assert factor < 1
    moved = jax.tree.map(lambda new, old: new - old, second.params, params)
    wanted = jax.tree.map(lambda new, old: factor * (new - old), whole.params, params)
    assert max_difference(moved, wanted) <= 1e-6


def test_a_layer_whose_gradient_is_not_finite_is_left_out_with_all_its_state():
    params = params_of(CONFIG)
    tx = galore_jax.adamw(0.003, 8, GAP)
    steps = compiled_steps(model_of(CONFIG), tx)
    step = steps[True](params, layerwise.init(tx, params), batch_of(0))
    # The input of the middle layer's down projection is so large that squares leave float32.
    broken = jax.tree.map(lambda leaf: leaf, step.params)
    up = broken["layers"]["mlp"]["up_proj"]["kernel"]
    broken["layers"]["mlp"]["up_proj"]["kernel"] = up.at[1].multiply(1e30)
    down = broken["layers"]["mlp"]["down_proj"]["kernel"]
    broken["layers"]["mlp"]["down_proj"]["kernel"] = down.at[1].multiply(1e-30)
    after = steps[False](broken, step.state, batch_of(1))
    kernels = [tree["layers"]["mlp"]["down_proj"]["kernel"] for tree in (broken, after.params)]
    np.testing.assert_array_equal(kernels[0][1], kernels[1][1])
    assert (kernels[0][0] != kernels[1][0]).any()
    basis = after.state.inner.inner_states[0].bases["layers"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(basis.skipped, [0, 1, 0])
    assert jnp.isfinite(after.state.norm)


def test_an_optimizer_without_galore_takes_full_gradients_and_8_bits():
    eight_bit = optax.chain(galore_jax.scale_by_adam8bit(), optax.scale(-0.003))
    for tx in (optax.adamw(0.003), eight_bit):
        steps, ordinary = both_steps(tx)
        params = params_of(CONFIG)
        state = tx.init(params)
        for t in range(4):
            found = steps[False](params, layerwise_state(state), batch_of(t))
            params, state, _ = ordinary[False](params, state, batch_of(t))
            # Of the first gradients some are so small that their sign is rounding.
            close = jax.tree.map(lambda a, b: jnp.abs(a - b) < 1e-5, found.params, params)
            assert min(float(leaf.mean()) for leaf in jax.tree.leaves(close)) > 0.99


def test_an_optimizer_that_keeps_a_random_key_is_taken():
    tx = optax.chain(optax.add_noise(1e-9, 0.5, 0), optax.adam(0.01))
    params, batch = params_of(CONFIG), batch_of(0)
    step = jax.jit(galore_jax.make_step(model_of(CONFIG), tx))
    assert np.isfinite(step(params, layerwise.init(tx, params), batch).value)


def test_an_optimizer_that_treats_a_stack_as_one_matrix_is_refused():
    tx = optax.adafactor(0.003, min_dim_size_to_factor=2)
    params = params_of(CONFIG)
    step = galore_jax.make_step(model_of(CONFIG), tx)
    with pytest.raises(ValueError, match=r"scale.*, \(\d+,\), that is not stacked by layer"):
        step(params, layerwise.init(tx, params), batch_of(0))


@pytest.mark.slow
def test_a_step_without_a_gradient_leaves_the_norm_that_clips_the_next():
    tx = galore_jax.chain(galore_jax.galore(8), optax.sgd(1.0))
    step = compiled_steps(model_of(CONFIG), tx, clip_norm=0.3, clip_by="previous_step")[True]
    params = params_of(CONFIG)
    first = step(params, layerwise.init(tx, params), batch_of(0))
    nothing = batch_of(1) | {"targets": jnp.full((4, 24), -1)}
    second = step(first.params, first.state, nothing)
    assert second.state.norm == first.state.norm > 0.3
    assert max_difference(second.params, first.params) == 0


def test_bfloat16_parameters_are_rounded_by_the_key_to_neighbours_of_the_nearest():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    tx = galore_jax.adamw(0.003, 8)
    params = params_of(config)
    state = layerwise.init(tx, params)
    step = jax.jit(galore_jax.make_step(model_of(config), tx, refreshes=False))
    nearest = step(params, state, batch_of(0))
    with_key = lambda i: step(params, state, batch_of(0), rounding_key=jax.random.key(i)).params
    one, other = map(with_key, range(2))
    for found, also, wanted in zip(
        *map(jax.tree.leaves, (one, other, nearest.params)), strict=True
    ):
        assert found.dtype == jnp.bfloat16
        places = [leaf.view(jnp.int16).astype(int) for leaf in (found, also, wanted)]
        assert np.abs(places[0] - places[2]).max() <= 1
    kernels = [tree["layers"]["mlp"]["up_proj"]["kernel"] for tree in (one, other)]
    for layer in range(CONFIG.num_layers):
        assert (kernels[0][layer] != kernels[1][layer]).mean() > 0.1
    moments = optax.tree.get(nearest.state.inner, "mu")["lm_head"]["kernel"]
    assert moments.dtype == jnp.float32


def memory(step, *arguments):
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return compiled.memory_analysis()


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batches", "refreshes"), [(1, True), (1, False), (2, False)])
def test_temporary_memory_grows_with_depth_only_by_inputs_and_accumulated_coordinates(
    micro_batches, refreshes
):
    rank, rows, length, hidden, wide = 32, 4, 24, 128, 352
    tx = galore_jax.adamw(0.01, rank, eight_bit=True)
    batch = batch_of(0, rows, length)
    depths, sizes = np.array([8, 16, 32]), []
    for depth in depths:
        config = LlamaConfig(97, hidden, wide, int(depth), 4, max_length=length)
        params = jax.eval_shape(functools.partial(initial, config))
        state = jax.eval_shape(functools.partial(layerwise.init, tx), params)
        settings = {"refreshes": refreshes, "micro_batches": micro_batches}
        step = galore_jax.make_step(model_of(config), tx, **settings)
        sizes.append(memory(step, params, state, batch).temp_size_in_bytes)
    slope, start = np.polyfit(depths, sizes, 1)
    kept = rows // micro_batches * length * hidden * 4
    if micro_batches > 1:
        kept += 4 * (rank * (4 * hidden + 3 * wide) + 2 * hidden)
    layer = 4 * (4 * hidden**2 + 3 * hidden * wide)
    # A tenth of a layer's parameters would be ten times what is allowed here beside what is kept.
    assert kept * 0.9 <= slope <= kept + layer / 100
    np.testing.assert_allclose(np.polyval((slope, start), depths), sizes, rtol=0.01)

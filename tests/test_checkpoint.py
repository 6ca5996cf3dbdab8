import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate import load_model

from galore_jax.data.batches import DataConfig, train_batches
from galore_jax.data.tokenizers import ByteTokenizer
from galore_jax.errors import InputError
from galore_jax.models.llama import LlamaConfig
from galore_jax.ops.quantization import Quantized
from galore_jax.training.checkpoint import Checkpoints, checksum, json_checksum, open_parameters
from galore_jax.training.config import Config, GaloreConfig, OptimizerConfig, TrainingConfig
from galore_jax.training.pretraining import Pretraining
from galore_jax.training.state import init_state
from galore_jax.training.step import Stepper

CONFIG = Config(
    LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        max_length=16,
        dtype="bfloat16",
    ),
    DataConfig(sequence_length=16, batch_size=4),
    OptimizerConfig(galore=GaloreConfig(rank=8), warmup_steps=0, clip_norm=1.0),
    TrainingConfig(steps=10),
)


def assert_same(one, other):
    """Equal nodes, dtypes and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def copied(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


@pytest.fixture(scope="module")
def initial():
    return copied(jax.jit(lambda: init_state(Pretraining(CONFIG)))())


@pytest.fixture
def state(initial):
    return jax.device_put(initial)


@pytest.fixture
def batches():
    return train_batches(CONFIG.data, ByteTokenizer())


@pytest.fixture
def saved(tmp_path, state, batches):
    """A run's folder with one checkpoint, after no update."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state, batches, CONFIG)
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_a_save_on_a_cpu_copies_nothing(tmp_path):
    """Of a state of 200 MB less than a quarter is added to the largest resident memory."""
    script = f"""
import jax, jax.numpy as jnp
from pathlib import Path
from types import SimpleNamespace
from galore_jax.training.checkpoint import Checkpoints
from galore_jax.training.config import Config
from galore_jax.training.state import TrainState

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

bits = jax.jit(lambda key: jax.random.bits(key, (50, 1000, 1000), jnp.uint8))
params = {{str(n): bits(jax.random.key(n)) for n in range(4)}}
state = TrainState(jax.block_until_ready(params), jnp.zeros(1), jnp.int32(1), jnp.uint32(0))
batches = SimpleNamespace(get_state=lambda: {{"n": 1}})
with Checkpoints(Path({str(tmp_path)!r})) as checkpoints:
    checkpoints.save(state._replace(params={{"0": jnp.zeros(1)}}), batches, Config())
    before = kilobytes("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # sets the peak to what is resident now
    checkpoints.save(state._replace(step=jnp.int32(2)), batches, Config())
    assert checkpoints.latest() == 2
    print(kilobytes("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 50_000


def test_state_and_data_are_restored_bit_for_bit(tmp_path, state, batches):
    next(batches)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(state, batches, CONFIG)
        checkpoints.wait()
    following = next(batches)
    again = train_batches(CONFIG.data, ByteTokenizer())
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(Pretraining(CONFIG), again)
    assert_same(restored, state)
    assert_same(next(again), following)


@pytest.mark.slow
def test_8_bit_codes_and_the_norm_of_a_layerwise_run_are_restored_bit_for_bit(tmp_path, batches):
    optimizer = dataclasses.replace(
        CONFIG.optimizer,
        name="galore_adamw8bit",
        clip_by="previous_step",
        galore=dataclasses.replace(CONFIG.optimizer.galore, basis_dtype="int4"),
    )
    model = dataclasses.replace(CONFIG.model, hidden_size=64, intermediate_size=96)
    training = dataclasses.replace(CONFIG.training, layerwise=True)
    config = dataclasses.replace(CONFIG, model=model, optimizer=optimizer, training=training)
    stepper = Stepper(Pretraining(config))
    state, _ = stepper(jax.jit(lambda: init_state(Pretraining(config)))(), next(batches))
    assert state.opt_state.norm > 0
    is_quantized = lambda node: isinstance(node, Quantized)
    nodes = filter(is_quantized, jax.tree.leaves(state.opt_state, is_leaf=is_quantized))
    assert {node.code for node in nodes} == {"signed", "unsigned", "int4"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, batches, config)
        checkpoints.wait()
        again = train_batches(config.data, ByteTokenizer())
        restored = checkpoints.restore(Pretraining(config), again)
    assert_same(restored, state)
    batch = next(batches)
    assert_same(next(again), batch)
    assert_same(stepper(restored, batch)[0], Stepper(Pretraining(config))(state, batch)[0])


def test_a_checkpoint_holds_its_step_while_training_continues(tmp_path, state, batches):
    later = jax.jit(
        lambda state: jax.tree.map(lambda leaf: (leaf + 1).astype(leaf.dtype), state),
        donate_argnums=0,
    )
    expected = copied(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, batches, CONFIG)
        for _ in range(20):
            state = later(state)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(Pretraining(CONFIG), batches), expected)


def test_only_the_latest_are_kept(tmp_path, state, batches):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state._replace(step=np.int32(step)), batches, CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_what_a_killed_save_left_behind_is_neither_read_nor_kept(saved, state, batches):
    unfinished = saved / "checkpoints" / "5.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "half").write_text("half")
    with Checkpoints(saved / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 0
        # Orbax removes it in the background, which the next save waits for.
        checkpoints.save(state._replace(step=np.int32(5)), batches, CONFIG)
    assert not unfinished.exists()


def test_inference_gets_the_parameters_and_the_configuration(saved, state):
    config, params = load_model(saved)
    assert config == CONFIG
    assert_same(params, state.params)


def test_a_checkpoint_of_another_model_is_refused_by_the_key_that_differs(saved, batches):
    other = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, intermediate_size=64)
    )
    with (
        Checkpoints(saved / "checkpoints") as checkpoints,
        pytest.raises(InputError, match=r"another model\.intermediate_size, 48, which"),
    ):
        checkpoints.restore(Pretraining(other), batches)


def flip_middle(path):
    content = bytearray(path.read_bytes())
    # More than a byte, as one may be padding that no array depends on.
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 0x10 for byte in content[middle : middle + 64])
    path.write_bytes(content)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def raise_a_digit(path):
    text = path.read_text()
    at = max(index for index, letter in enumerate(text) if letter in "012345678")
    path.write_text(f"{text[:at]}{int(text[at]) + 1}{text[at + 1 :]}")


def largest_file(folder):
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())


@pytest.mark.parametrize("damage", [flip_middle, halve, Path.unlink])
def test_a_checkpoint_with_a_damaged_file_of_parameters_is_refused_by_name(saved, batches, damage):
    checkpoint = saved / "checkpoints" / "0"
    damage(largest_file(checkpoint / "params" / "ocdbt.process_0" / "d"))
    with (
        Checkpoints(saved / "checkpoints") as checkpoints,
        pytest.raises(InputError, match=r"0 is damaged .*: move it out of .* to start from the"),
    ):
        checkpoints.restore(Pretraining(CONFIG), batches)
    with pytest.raises(InputError, match="is damaged"), open_parameters(saved):
        pass
    with pytest.raises(InputError, match="is damaged") as refused:
        load_model(saved)
    assert "\n" not in str(refused.value)
    assert str(checkpoint) in str(refused.value)


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("optimizer/ocdbt.process_0/d", flip_middle, "is damaged"),
        ("optimizer/_METADATA", halve, "is damaged"),
        ("data/metadata", raise_a_digit, "its data differs from what was saved"),
        ("meta/metadata", flip_middle, "is damaged"),
        ("meta/metadata", halve, "is damaged"),
        ("meta/metadata", raise_a_digit, "its meta differs from what was saved"),
    ],
)
def test_other_damage_is_reported_with_the_previous_checkpoint(saved, state, file, damage, named):
    later = train_batches(CONFIG.data, ByteTokenizer())
    next(later)
    with Checkpoints(saved / "checkpoints") as checkpoints:
        checkpoints.save(state._replace(step=np.int32(1)), later, CONFIG)
        checkpoints.wait()
        place = saved / "checkpoints" / "1" / file
        damage(largest_file(place) if place.is_dir() else place)
        with pytest.raises(InputError, match=f"{named}.*: move it out of .* to resume from 0"):
            checkpoints.restore(Pretraining(CONFIG), later)


def test_without_the_latest_checkpoint_the_previous_one_is_restored(saved, state, batches):
    with Checkpoints(saved / "checkpoints") as checkpoints:
        checkpoints.save(state._replace(step=np.int32(1)), batches, CONFIG)
    (saved / "checkpoints" / "1").rename(saved / "damaged")
    with Checkpoints(saved / "checkpoints") as checkpoints:
        assert checkpoints.restore(Pretraining(CONFIG), batches).step == 0


def test_a_renamed_checkpoint_is_refused_with_its_step(saved, batches):
    (saved / "checkpoints" / "0").rename(saved / "checkpoints" / "20")
    with (
        Checkpoints(saved / "checkpoints") as checkpoints,
        pytest.raises(InputError, match=r"20 is the checkpoint of step 0: rename it to 0, or"),
    ):
        checkpoints.restore(Pretraining(CONFIG), batches)
    with pytest.raises(InputError, match="20 is the checkpoint of step 0"):
        load_model(saved)


def test_a_name_that_orbax_takes_for_a_pattern_is_refused_before_a_save(tmp_path):
    with pytest.raises(InputError, match=r"run\[1\]/checkpoints has a \*"):
        Checkpoints(tmp_path / "run[1]" / "checkpoints")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoints/"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        load_model(tmp_path)


VALUES = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "uint8"])
def test_every_bit_of_every_element_counts(dtype):
    values = np.asarray(jnp.asarray(VALUES, dtype))
    expected = checksum([values])
    assert checksum([jnp.asarray(values)]) == expected
    for byte in range(values.nbytes):
        damaged = bytearray(values.tobytes())
        damaged[byte] ^= 1 << byte % 8
        other = np.frombuffer(damaged, values.dtype).reshape(values.shape)
        assert checksum([other]) != expected


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_on_any_device_the_sum_is_that_of_all_elements_in_order(dtype):
    """A matrix is summed by parts on a CPU, and never a vector."""
    values = VALUES.astype(dtype)
    assert checksum([values]) == checksum([values.ravel()])


def test_booleans_count():
    values = np.array([[True, False], [False, False]])
    assert checksum([jnp.asarray(values)]) == checksum([values]) != checksum([~values])


def test_the_order_of_elements_and_of_leaves_counts():
    one, other = np.float32([1, 2, 2]), np.float32([2, 1, 2])
    assert checksum([one]) != checksum([other])
    assert checksum([one, other]) != checksum([other, one])


def test_the_order_of_json_keys_does_not_count_and_their_values_do():
    assert json_checksum({"a": 1, "b": None}) == json_checksum({"b": None, "a": 1})
    assert json_checksum({"a": 1}) != json_checksum({"a": 2})

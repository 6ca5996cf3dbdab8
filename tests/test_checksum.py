import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.training.checksum import host_checksum, json_checksum, tree_checksum

VALUES = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "uint8"])
def test_every_bit_of_every_element_counts(dtype):
    values = np.asarray(jnp.asarray(VALUES, dtype))
    checksum = tree_checksum({"values": values})
    assert checksum == tree_checksum({"values": values.copy()})
    for byte in range(values.nbytes):
        damaged = bytearray(values.tobytes())
        damaged[byte] ^= 1 << byte % 8
        other = np.frombuffer(damaged, values.dtype).reshape(values.shape)
        assert checksum != tree_checksum({"values": other})


def test_the_order_of_elements_and_of_leaves_counts():
    one, other = np.float32([1, 2, 2]), np.float32([2, 1, 2])
    assert tree_checksum(one) != tree_checksum(other)
    assert tree_checksum([one, other]) != tree_checksum([other, one])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_arrays_in_host_memory_have_the_checksum_of_the_device(dtype, monkeypatch):
    monkeypatch.setattr("galore_jax.training.checksum._SUMMED_AT_ONCE", 5)
    draw = np.random.default_rng(0).normal(size=(2, 3, 4)) * 50
    leaves = [np.asarray(jnp.asarray(part, dtype)) for part in (draw, draw[0].T, draw[0, 0, 0])]
    assert host_checksum(leaves) == tree_checksum(leaves)


def test_the_order_of_json_keys_does_not_count_and_their_values_do():
    assert json_checksum({"a": 1, "b": None}) == json_checksum({"b": None, "a": 1})
    assert json_checksum({"a": 1}) != json_checksum({"a": 2})

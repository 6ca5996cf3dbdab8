import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.training.checkpoint import checksum, json_checksum

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

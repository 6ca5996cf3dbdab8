"""Random bits of positions: they are those of no tile, and look random wherever one looks."""

import jax.numpy as jnp
import numpy as np
import pytest

from galore_jax.ops.noise import ROW, noise

SEED = jnp.array([3, 5], jnp.uint32)
SHAPE = (512, 1024)
# Of a mean of this many independent numbers of variance 1, five deviations.
BOUND = 5 / (SHAPE[0] * SHAPE[1] - 10 * SHAPE[1]) ** 0.5


def signs(seed=SEED, row=0, column=0):
    """The 16 bits of each element, as ±1."""
    bits = np.asarray(noise(seed, row, column, SHAPE))
    return 2.0 * (bits[..., None] >> np.arange(16) & 1) - 1


def test_they_depend_on_the_position_and_not_on_the_tile():
    bits = noise(SEED, 0, 0, (30, 21))
    for column in (4, 5):
        part = noise(SEED, 8, column, (5, 9))
        np.testing.assert_array_equal(part, bits[8:13, column : column + 9])
    transposed = noise(SEED, 8, 5, (9, 5), transposed=True)
    np.testing.assert_array_equal(transposed.T, part)
    assert int(bits.max()) < 2**16


@pytest.mark.parametrize(("row", "column"), [(0, 0), (2**20, 0), (0, 2**20)])
def test_all_values_are_equally_frequent(row, column):
    values = np.asarray(noise(SEED, row, column, SHAPE))
    counts = np.bincount(values.ravel(), minlength=2**16)
    # χ² has 2^16 − 1 degrees of freedom, and a variance of twice that.
    expected = values.size / 2**16
    excess = ((counts - expected) ** 2 / expected).sum() - (2**16 - 1)
    assert abs(excess) < 5 * (2 * 2**16) ** 0.5


@pytest.mark.parametrize("offset", [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (8, 0), (9, 7)])
def test_bits_of_neighbours_are_not_correlated(offset):
    one, other = signs(), signs(row=offset[0], column=offset[1])
    correlations = np.einsum("ijm,ijn->mn", one, other) / (SHAPE[0] * SHAPE[1])
    assert np.abs(correlations).max() < BOUND


@pytest.mark.parametrize("bit", [0, 1, 16, 31])
@pytest.mark.parametrize("half", [0, 1])
def test_bits_of_seeds_that_differ_in_one_bit_are_not_correlated(half, bit):
    other = SEED.at[half].set(SEED[half] ^ jnp.uint32(1 << bit))
    correlations = np.einsum("ijm,ijn->mn", signs(), signs(other)) / (SHAPE[0] * SHAPE[1])
    assert np.abs(correlations).max() < BOUND


@pytest.mark.parametrize(("rows", "columns"), [(262_144, 11_703), (16_384, 53_248)])
def test_the_elements_of_a_large_matrix_have_numbers_of_their_own(rows, columns):
    starts = np.sort(np.arange(rows, dtype=np.uint64) * ROW % 2**32)
    gaps = np.diff(starts, append=starts[:1] + np.uint64(2**32))
    assert gaps.min() >= columns

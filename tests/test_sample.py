import pytest

from galore_jax.errors import InputError
from galore_jax.training.sample import generate_text


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_out_of_range_is_refused_before_a_checkpoint_is_looked_for(tmp_path, seed):
    with pytest.raises(InputError, match=rf"seed is {seed}: it must be between 0 and 4294967295"):
        generate_text(tmp_path, "import", 5, seed=seed)


def test_a_prompt_that_is_not_utf8_is_refused(tmp_path):
    argument = b"caf\xe9".decode(errors="surrogateescape")  # as sys.argv holds it
    with pytest.raises(InputError, match=r"the prompt 'caf\\udce9' is not UTF-8: convert it"):
        generate_text(tmp_path, argument, 5)

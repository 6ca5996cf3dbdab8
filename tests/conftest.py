"""Settings of all tests."""

import gc
import os

import pytest

# Tests compile many small programs and run each a few times: half the time goes into optimising.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_file_end_with_it():
    """Each compiled program maps a few pages, and Linux grants a process 65,530 maps."""
    yield
    # JAX is imported late, so that the flags above are set before.
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def linen():
    """Flax Linen, for tests of the optimizer that need Flax where others of the file do not."""
    return pytest.importorskip("flax.linen")


@pytest.fixture(scope="session")
def nnx():
    """Flax NNX, likewise."""
    return pytest.importorskip("flax.nnx")

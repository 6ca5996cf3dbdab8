"""Settings of all tests."""

import atexit
import gc
import importlib.metadata
import os
import platform
import shutil
import tempfile

import pytest

# Tests compile many small programs and run each a few times, so that optimising them does not pay.
FLAGS = [
    *("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"),
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10.") and platform.machine() == "x86_64":
    # Half the time. Later versions have no other emitters than the new ones. Without fused
    # multiplications and additions results do not depend on what these emitters fuse.
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_max_isa=AVX"]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

# What one test has compiled, no later one compiles anew, nor does a process that it starts. Each
# process of pytest-xdist has its own cache, as JAX writes entries where another could read halves.
# A cache that the environment names is kept from one run to the next.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="galore_jax-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_file_end_with_it():
    """Each compiled program maps a few pages, and Linux grants a process 65,530 maps."""
    yield
    # JAX is imported late, so that the settings above are set before.
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

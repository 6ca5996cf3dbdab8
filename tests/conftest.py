"""Settings of all tests."""

import atexit
import contextlib
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

# What one test has compiled, no later one compiles anew, nor does a process that it starts. JAX
# writes entries where another process could read halves, so each process of pytest-xdist has a
# folder of its own: it starts with links to what is in the common one, and ends by adding to it.
# A folder that the environment names serves later runs too.
COMMON_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR")
if COMMON_CACHE is None:
    COMMON_CACHE = tempfile.mkdtemp(prefix="galore_jax-tests-")
    atexit.register(shutil.rmtree, COMMON_CACHE, ignore_errors=True)


def link_files(source, target):
    """Links to the files of one folder in another, which keeps what it has."""
    for entry in os.scandir(source):
        if entry.is_file():
            with contextlib.suppress(FileExistsError):
                os.link(entry.path, os.path.join(target, entry.name))


os.makedirs(COMMON_CACHE, exist_ok=True)
OWN_CACHE = tempfile.mkdtemp(prefix="process-", dir=COMMON_CACHE)
link_files(COMMON_CACHE, OWN_CACHE)
os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
os.environ |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def pytest_unconfigure():
    """The workers of pytest-xdist end before the process that started them."""
    link_files(OWN_CACHE, COMMON_CACHE)
    shutil.rmtree(OWN_CACHE, ignore_errors=True)


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

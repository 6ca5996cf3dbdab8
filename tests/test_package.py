"""The package as a whole."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def distributions(requirements):
    names = (re.match(r"[\w.-]+", requirement)[0] for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_the_package_needs_jax_optax_and_numpy():
    assert distributions(PROJECT["dependencies"]) == {"jax", "optax", "numpy"}


def test_importing_the_package_loads_nothing_of_the_extras():
    extras = distributions(chain.from_iterable(PROJECT["optional-dependencies"].values()))
    extras -= {"galore-jax", *distributions(PROJECT["dependencies"])}
    modules = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if distributions(owners) & extras
    }
    assert {"pytest", "hypothesis"} <= modules, "the names of modules are not found"
    # What JAX imports where it is installed does not count.
    code = (
        "import sys, jax, numpy, optax; before = {*sys.modules}; "
        "import galore_jax; print(*({*sys.modules} - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert modules & set(done.stdout.split()) == set()

"""The package as a whole."""

import subprocess
import sys


def test_importing_the_optimizer_loads_neither_flax_nor_the_rooms_of_the_trainer():
    code = (
        "import sys, galore_jax\n"
        "heavy = {'flax', 'tensorflow_datasets', 'grain', 'orbax', 'sentencepiece', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

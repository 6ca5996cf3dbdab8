"""Trains a LLaMA from a configuration file.

python scripts/train.py --config configs/demo.toml
python scripts/train.py --config configs/llama_60m.toml data.source=data training.steps=1000
python scripts/train.py --config runs/demo/config.toml --resume
python scripts/train.py --config configs/llama_1b.toml model.checkpoint=FOLDER  # of transformers

It trains on all devices. Several processes, each on its devices, train together if Slurm or Open
MPI starts them, or if all are given the address of the first one and their own number:

python scripts/train.py --config configs/llama_1b.toml mesh.fsdp=8 \
    --coordinator node0:1234 --processes 2 --process 0
"""

import argparse
import shlex
import sys

from command_line import end_quietly_on_ctrl_c

if __name__ == "__main__":
    end_quietly_on_ctrl_c()  # Also while JAX is imported.

from galore_jax.errors import run_cli


def main() -> None:
    """Reads the arguments and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a TOML file, as configs/demo.toml")
    parser.add_argument("--resume", action="store_true", help="continue the run in its folder")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--processes", type=int, metavar="N", help="how many train together")
    parser.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    # Imported late, so that a wrong argument is reported before JAX takes its second to load.
    from galore_jax.training.config_file import load_config
    from galore_jax.training.loop import Interrupted, train
    from galore_jax.training.pretraining import Pretraining
    from galore_jax.training.processes import ending_together, is_first, joined, keep_programs

    with joined(arguments.coordinator, arguments.processes, arguments.process):
        keep_programs()
        with ending_together():
            config = load_config(arguments.config, arguments.overrides)
        try:
            train(Pretraining(config), arguments.resume)
        except Interrupted as stop:
            if is_first():
                print(stop, file=sys.stderr)
                if not stop.is_finished:
                    print(_how_to_resume(config.training.folder), file=sys.stderr)
            sys.exit(stop.status)


def _how_to_resume(folder: str) -> str:
    import jax

    # Processes that a cluster starts have no such arguments.
    every = " every process (adding its --coordinator, --processes and --process, if given)"
    command = [sys.executable, sys.argv[0], "--config", f"{folder}/config.toml", "--resume"]
    return f"Resume{every if jax.process_count() > 1 else ''} with\n  {shlex.join(command)}"


if __name__ == "__main__":
    run_cli(main)

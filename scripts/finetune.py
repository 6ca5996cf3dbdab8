"""Fine-tunes a RoBERTa or BERT on a task of GLUE, with several seeds.

python scripts/finetune.py --config configs/glue/rte.toml model.checkpoint=roberta-base
python scripts/finetune.py --config configs/glue/rte.toml model.checkpoint=roberta-base \
    data.source=glue training.seeds=3 optimizer.galore.rank=8 optimizer.galore.scale=2
python scripts/finetune.py --config configs/glue/minilm.toml --rates 3e-5,1e-4,3e-4,1e-3 \
    --tasks cola,mrpc,rte

The last command compares the optimizers of the tables [compare.LABEL] in the file, each at the rate
with which the first seed is best, on each of the tasks and on average; without --tasks on that of
the file. Runs are kept: the same command continues.
"""

import argparse
import sys

from command_line import end_quietly_on_ctrl_c, separated

if __name__ == "__main__":
    end_quietly_on_ctrl_c()  # Also while JAX is imported.

from galore_jax.errors import InputError, run_cli


def main() -> None:
    """Reads the arguments, fine-tunes or compares, and prints the means over the seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a TOML file, as configs/glue/rte.toml")
    for option, kind, what in (
        ("--rates", float, "compare at learning rates to choose from, as in 3e-5,1e-4"),
        ("--tasks", str, "compare on each of these and on average, as in cola,rte"),
    ):
        parser.add_argument(option, type=separated(kind), default=(), help=what)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    rates, tasks = arguments.rates, arguments.tasks
    if tasks and not rates:
        raise InputError("--tasks compares learning rates: give --rates too, as in 3e-5,1e-4.")

    # Imported late, so that a wrong argument is reported before JAX takes its second to load.
    from analysis.comparison import compare_finetuning, tables

    from galore_jax.training.config import FinetuneConfig
    from galore_jax.training.config_file import load_comparison, load_config
    from galore_jax.training.finetune import finetune
    from galore_jax.training.loop import Interrupted
    from galore_jax.training.processes import keep_programs

    keep_programs()
    try:
        if rates:
            configs = load_comparison(arguments.config, arguments.overrides, kind=FinetuneConfig)
            print(tables(compare_finetuning(configs, rates, tasks)), end="")
            return
        summary = finetune(load_config(arguments.config, arguments.overrides, FinetuneConfig))
    except Interrupted as stop:
        print("stopped: run the same command again to continue.", file=sys.stderr)
        sys.exit(stop.status)
    print(
        f"{summary['task']}: {summary['metric']} {summary['mean']:.4f} "
        f"± {summary['deviation']:.4f}, seeds: {len(summary['best'])}"
    )


if __name__ == "__main__":
    run_cli(main)

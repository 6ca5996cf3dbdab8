"""Fine-tunes a RoBERTa or BERT on a task of GLUE, with several seeds.

python scripts/finetune.py --config configs/glue/rte.toml model.checkpoint=roberta-base
python scripts/finetune.py --config configs/glue/rte.toml model.checkpoint=roberta-base \
    data.source=glue training.seeds=3 optimizer.rank=8 optimizer.scale=2
"""

import argparse

from galore_jax.errors import run_cli


def main() -> None:
    """Reads the arguments, fine-tunes and prints the mean and deviation over the seeds."""
    parser = argparse.ArgumentParser(description="Fine-tunes an encoder on a task of GLUE.")
    parser.add_argument("--config", required=True, help="a TOML file, as configs/glue/rte.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    # Imported late, so that a wrong argument is reported before JAX takes its second to load.
    from galore_jax.training.config_file import load_config
    from galore_jax.training.finetune import finetune
    from galore_jax.training.finetune_config import FinetuneConfig

    summary = finetune(load_config(arguments.config, arguments.overrides, FinetuneConfig))
    print(
        f"{summary['task']}: {summary['metric']} {summary['mean']:.4f} "
        f"± {summary['deviation']:.4f} over {len(summary['best'])} seeds"
    )


if __name__ == "__main__":
    run_cli(main)

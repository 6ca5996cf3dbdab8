"""The LLaMA trainer: configuration, step, loop, evaluation, checkpoints and metrics."""

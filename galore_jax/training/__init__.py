"""Configuration, training step, loop, evaluation, checkpoints and metrics."""
